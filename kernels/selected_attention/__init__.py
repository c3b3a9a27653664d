"""Softmax attention of every query over keys of its own choice: the core of block-sparse and indexed attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from archcompass.kernels.selected_attention.cost import selected_attention_cost

if TYPE_CHECKING:
    from archcompass.kernels.selected_attention.op import explain as explain
    from archcompass.kernels.selected_attention.op import selected_attention as selected_attention

_LAZY = {"explain": "op", "selected_attention": "op"}

__all__ = ["explain", "selected_attention", "selected_attention_cost"]


def __getattr__(name: str) -> Any:
    """Imports torch only when an operation itself is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
