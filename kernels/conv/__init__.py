"""Causal depthwise convolution over time: the short filter in front of Mamba, DeltaNet and their kin."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.kernels.conv.cost import causal_conv_cost as causal_conv_cost
    from archcompass.kernels.conv.op import causal_conv as causal_conv
    from archcompass.kernels.conv.op import explain as explain

_HOMES = {
    "causal_conv": "archcompass.kernels.conv.op",
    "causal_conv_cost": "archcompass.kernels.conv.cost",
    "explain": "archcompass.kernels.conv.op",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
