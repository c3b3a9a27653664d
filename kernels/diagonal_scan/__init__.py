"""Diagonal linear recurrences: the RG-LRU of Griffin, and the numerator and denominator of RWKV-4.

    h_t = exp(g_t) h_{t-1} + b_t,   every channel by itself

The public names load torch when first used; `archcompass.kernels.diagonal_scan.cost` never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.kernels.diagonal_scan.cost import diagonal_scan_cost as diagonal_scan_cost
    from archcompass.kernels.diagonal_scan.op import diagonal_scan as diagonal_scan
    from archcompass.kernels.diagonal_scan.op import explain as explain

_HOMES = {
    "diagonal_scan": "archcompass.kernels.diagonal_scan.op",
    "diagonal_scan_cost": "archcompass.kernels.diagonal_scan.cost",
    "explain": "archcompass.kernels.diagonal_scan.op",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
