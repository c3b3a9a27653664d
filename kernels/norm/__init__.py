"""RMS normalisation, with residual, gate and groups. The public names load torch when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.kernels.norm.cost import rms_norm_cost as rms_norm_cost
    from archcompass.kernels.norm.op import explain as explain
    from archcompass.kernels.norm.op import rms_norm as rms_norm

_HOMES = {
    "explain": "archcompass.kernels.norm.op",
    "rms_norm": "archcompass.kernels.norm.op",
    "rms_norm_cost": "archcompass.kernels.norm.cost",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
