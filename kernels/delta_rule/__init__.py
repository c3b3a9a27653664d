"""The delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention and, as diagonal plus low rank, RWKV-7.

    S_t = (I - β_t k_t k_tᵀ) Diag(exp(g_t)) S_{t-1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

A write first erases what the state already says under its key. The public names load torch when first used;
`archcompass.kernels.delta_rule.cost` never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archcompass.kernels.delta_rule.cost import delta_rule_cost as delta_rule_cost
    from archcompass.kernels.delta_rule.cost import dplr_cost as dplr_cost
    from archcompass.kernels.delta_rule.op import delta_rule as delta_rule
    from archcompass.kernels.delta_rule.op import delta_rule_step as delta_rule_step
    from archcompass.kernels.delta_rule.op import dplr as dplr
    from archcompass.kernels.delta_rule.op import dplr_step as dplr_step
    from archcompass.kernels.delta_rule.op import explain as explain
    from archcompass.kernels.delta_rule.op import explain_dplr as explain_dplr

_HOMES = {
    "delta_rule": "archcompass.kernels.delta_rule.op",
    "delta_rule_cost": "archcompass.kernels.delta_rule.cost",
    "delta_rule_step": "archcompass.kernels.delta_rule.op",
    "dplr": "archcompass.kernels.delta_rule.op",
    "dplr_cost": "archcompass.kernels.delta_rule.cost",
    "dplr_step": "archcompass.kernels.delta_rule.op",
    "explain": "archcompass.kernels.delta_rule.op",
    "explain_dplr": "archcompass.kernels.delta_rule.op",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
