"""One token of the delta rule: two reads of the state at once, and a rank-one update.

With S the decayed state and S' = S + k uᵀ, the output qᵀ S' = qᵀ S + (q·k) uᵀ needs the state before the update only, so
k and q read it together, in one product.
"""

import torch
from torch import Tensor


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
    pair = torch.stack([k, q], dim=2).to(state.dtype)
    if k.shape[1] != v.shape[1]:
        pair = pair.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
    if log_decay is not None:
        decay = log_decay.to(state.dtype).exp()
        decay = decay[..., None] if decay.dim() == 3 else decay[..., None, None]
        state = state.mul_(decay) if inplace else state * decay
    predicted, read = (pair @ state).unbind(2)
    written = (v - predicted) * beta.unsqueeze(-1)
    key, query = pair.unbind(2)
    out = torch.addcmul(read, (key * query).sum(-1, keepdim=True), written)
    factors = key.unsqueeze(-1), written.unsqueeze(-2)
    state = state.addcmul_(*factors) if inplace else torch.addcmul(state, *factors)
    return (out if scale == 1.0 else scale * out).to(v.dtype), state


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
    q, k, v, a, b, log_decay = (x.to(state.dtype) for x in (q, k, v, a, b, log_decay))
    decay = log_decay.exp()
    low_rank, read = (torch.stack([a, q * decay], dim=2) @ state).unbind(2)
    out = read + (q * b).sum(-1, keepdim=True) * low_rank + (q * k).sum(-1, keepdim=True) * v
    state = state.mul_(decay.unsqueeze(-1)) if inplace else state * decay.unsqueeze(-1)
    for key, value in ((b, low_rank), (k, v)):
        factors = key.unsqueeze(-1), value.unsqueeze(-2)
        state = state.addcmul_(*factors) if inplace else torch.addcmul(state, *factors)
    return (out if scale == 1.0 else scale * out).to(dtype), state
