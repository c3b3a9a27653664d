"""The selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t · h_t

A decay for every channel and state entry: no matrix product carries it, unlike Mamba-2. The public names load torch when
first used; `archcompass.kernels.selective_scan.cost` never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.kernels.selective_scan.cost import exponentials as exponentials
    from archcompass.kernels.selective_scan.cost import selective_scan_cost as selective_scan_cost
    from archcompass.kernels.selective_scan.op import explain as explain
    from archcompass.kernels.selective_scan.op import selective_scan as selective_scan
    from archcompass.kernels.selective_scan.op import selective_scan_step as selective_scan_step

_HOMES = {
    "explain": "archcompass.kernels.selective_scan.op",
    "exponentials": "archcompass.kernels.selective_scan.cost",
    "selective_scan": "archcompass.kernels.selective_scan.op",
    "selective_scan_cost": "archcompass.kernels.selective_scan.cost",
    "selective_scan_step": "archcompass.kernels.selective_scan.op",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
