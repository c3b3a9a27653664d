"""Rotary position embedding: `rotate` turns queries and keys by given angles; which angles is the block's business."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from archcompass.kernels.rope.cost import rotate_cost

if TYPE_CHECKING:
    from archcompass.kernels.rope.op import explain as explain
    from archcompass.kernels.rope.op import rotate as rotate
    from archcompass.kernels.rope.op import rotate_one as rotate_one

_LAZY = {"explain": "op", "rotate": "op", "rotate_one": "op"}

__all__ = ["explain", "rotate", "rotate_cost", "rotate_one"]


def __getattr__(name: str) -> Any:
    """Imports torch only when an operation itself is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
