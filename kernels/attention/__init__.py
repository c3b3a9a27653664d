"""Softmax attention: grouped heads, windows, chunks, sinks, soft caps, padding, packed sequences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from archcompass.kernels.attention.cost import (
    attention_cost,
    dense_flops,
    latent_attention_cost,
    reachable_keys,
    sparse_attention_cost,
    visible_pairs,
)

if TYPE_CHECKING:
    from archcompass.kernels.attention.latent import latent_attention as latent_attention
    from archcompass.kernels.attention.op import attention as attention
    from archcompass.kernels.attention.op import explain as explain
    from archcompass.kernels.attention.sparse import sparse_attention as sparse_attention

_LAZY = {"attention": "op", "explain": "op", "latent_attention": "latent", "sparse_attention": "sparse"}

__all__ = [
    "attention",
    "attention_cost",
    "dense_flops",
    "explain",
    "latent_attention",
    "latent_attention_cost",
    "reachable_keys",
    "sparse_attention",
    "sparse_attention_cost",
    "visible_pairs",
]


def __getattr__(name: str) -> Any:
    """Imports torch only when an operation itself is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
