"""Decayed linear attention: one family for linear attention, RetNet, Lightning, Mamba-2 (SSD), GLA, HGRN2 and RWKV-6.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

What differs between the models is only the shape of the log decay g. The public names load torch when first used;
`archcompass.kernels.linear_attention.cost` never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.kernels.linear_attention.cost import linear_attention_cost as linear_attention_cost
    from archcompass.kernels.linear_attention.op import explain as explain
    from archcompass.kernels.linear_attention.op import linear_attention as linear_attention
    from archcompass.kernels.linear_attention.op import linear_attention_step as linear_attention_step

_HOMES = {
    "explain": "archcompass.kernels.linear_attention.op",
    "linear_attention": "archcompass.kernels.linear_attention.op",
    "linear_attention_cost": "archcompass.kernels.linear_attention.cost",
    "linear_attention_step": "archcompass.kernels.linear_attention.op",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
