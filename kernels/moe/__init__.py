"""Mixture of experts: `route` picks experts, `moe_mlp` runs them, `load_balance_loss` keeps them busy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from archcompass.kernels.moe.cost import expected_distinct_experts, moe_cost

if TYPE_CHECKING:
    from archcompass.kernels.moe.op import explain as explain
    from archcompass.kernels.moe.op import moe_mlp as moe_mlp
    from archcompass.kernels.moe.routing import load_balance_loss as load_balance_loss
    from archcompass.kernels.moe.routing import route as route

_LAZY = {"explain": "op", "moe_mlp": "op", "load_balance_loss": "routing", "route": "routing"}

__all__ = ["expected_distinct_experts", "explain", "load_balance_loss", "moe_cost", "moe_mlp", "route"]


def __getattr__(name: str) -> Any:
    """Imports torch only when an operation itself is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
