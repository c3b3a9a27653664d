"""archcompass: which neural architecture fits a workload, sized, built and profiled.

The public names are loaded when they are first used, so that `import archcompass` costs nothing and the advisor never
pays for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.advisor.recommend import Recommendation as Recommendation
    from archcompass.advisor.recommend import recommend as recommend
    from archcompass.advisor.workload import Workload as Workload
    from archcompass.blocks.hf.checkpoint import load_pretrained as load_pretrained
    from archcompass.blocks.hf.checkpoint import save_pretrained as save_pretrained
    from archcompass.blocks.model.files import load as load
    from archcompass.blocks.model.spec import ModelSpec as ModelSpec
    from archcompass.errors import ArchcompassError as ArchcompassError
    from archcompass.profiles.profile import profile as profile

__version__ = "0.1.0"

_HOMES = {
    "ArchcompassError": "archcompass.errors",
    "ModelSpec": "archcompass.blocks.model.spec",
    "Recommendation": "archcompass.advisor.recommend",
    "Workload": "archcompass.advisor.workload",
    "load": "archcompass.blocks.model.files",
    "load_pretrained": "archcompass.blocks.hf.checkpoint",
    "profile": "archcompass.profiles.profile",
    "recommend": "archcompass.advisor.recommend",
    "save_pretrained": "archcompass.blocks.hf.checkpoint",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'archcompass' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
