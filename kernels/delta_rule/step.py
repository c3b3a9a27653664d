"""One token of the delta rule: two reads of the state at once, and a rank-one update.

Because o = qᵀ S' with S' = αS + k uᵀ, the output needs only what is read from the old state: (q∘α)ᵀS + (q·k) u. So the
state is read once, by k and q together, and written once.
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
    group = v.shape[1] // k.shape[1]
    q, k = (x.to(state.dtype).repeat_interleave(group, dim=1) for x in (q, k))
    decay = None
    faded_k, faded_q = k, q
    if log_decay is not None:
        decay = log_decay.to(state.dtype).exp()
        decay = decay if decay.dim() == 3 else decay.unsqueeze(-1)
        faded_k, faded_q = k * decay, q * decay
    predicted, read = _read(faded_k, faded_q, state)
    written = beta.to(state.dtype).unsqueeze(-1) * (v.to(state.dtype) - predicted)
    out = read + (q * k).sum(-1, keepdim=True) * written
    return (scale * out).to(v.dtype), _updated(state, decay, [(k, written)], inplace=inplace)


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
    low_rank, read = _read(a, q * decay, state)
    out = read + (q * b).sum(-1, keepdim=True) * low_rank + (q * k).sum(-1, keepdim=True) * v
    return (scale * out).to(dtype), _updated(state, decay, [(b, low_rank), (k, v)], inplace=inplace)


def _read(first: Tensor, second: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Sᵀ applied to two keys per head, in one product."""
    one, two = (torch.stack([first, second], dim=-2) @ state).unbind(-2)
    return one, two


def _updated(state: Tensor, decay: Tensor | None, pairs: list[tuple[Tensor, Tensor]], *, inplace: bool) -> Tensor:
    """Diag(decay) S plus the outer products of the pairs."""
    if decay is not None:
        state = state.mul_(decay.unsqueeze(-1)) if inplace else state * decay.unsqueeze(-1)
    for key, value in pairs:
        factors = key.unsqueeze(-1), value.unsqueeze(-2)
        state = state.addcmul_(*factors) if inplace else torch.addcmul(state, *factors)
    return state
