"""Linear layer and cross entropy in one, without ever holding all logits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from archcompass.kernels.cross_entropy.cost import linear_cross_entropy_cost

if TYPE_CHECKING:
    from archcompass.kernels.cross_entropy.op import explain as explain
    from archcompass.kernels.cross_entropy.op import linear_cross_entropy as linear_cross_entropy

_LAZY = {"explain": "op", "linear_cross_entropy": "op"}

__all__ = ["explain", "linear_cross_entropy", "linear_cross_entropy_cost"]


def __getattr__(name: str) -> Any:
    """Imports torch only when an operation itself is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
