"""One token of the delta rule, as its formula says: fade the state, write into it, read it.

Reading k and q in one product before the write, which the algebra allows, costs more small operations than it saves.
"""

import torch
from torch import Tensor

from archcompass.kernels.eager import cast


def delta_rule_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `archcompass.kernels.delta_rule.delta_rule_step`; the state may be overwritten with `inplace`."""
    dtype, shared = v.dtype, v.shape[1] // k.shape[1]
    q, k, v, beta = cast(state.dtype, q, k, v, beta)
    if shared > 1:
        q, k = (x.repeat_interleave(shared, dim=1) for x in (q, k))
    if log_decay is not None:
        decay = log_decay.to(state.dtype).exp()
        decay = decay[..., None] if decay.dim() == 3 else decay[..., None, None]
        state = state.mul_(decay) if inplace else state * decay
    written = k.unsqueeze(-1), (v.unsqueeze(-2) - k.unsqueeze(-2) @ state) * beta[..., None, None]
    state = state.addcmul_(*written) if inplace else torch.addcmul(state, *written)
    return _read(q, state, scale, dtype), state


def dplr_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `archcompass.kernels.delta_rule.dplr_step`; the state may be overwritten with `inplace`."""
    dtype = v.dtype
    q, k, v, a, b, log_decay = cast(state.dtype, q, k, v, a, b, log_decay)
    low_rank, decay = a.unsqueeze(-2) @ state, log_decay.exp().unsqueeze(-1)
    state = state.mul_(decay) if inplace else state * decay
    for key, value in ((b, low_rank), (k, v.unsqueeze(-2))):
        written = key.unsqueeze(-1), value
        state = state.addcmul_(*written) if inplace else torch.addcmul(state, *written)
    return _read(q, state, scale, dtype), state


def _read(q: Tensor, state: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · Sᵀ q, [batch, heads, V]."""
    out = (q.unsqueeze(-2) @ state).squeeze(-2)
    return (out if scale == 1.0 else scale * out).to(dtype)
