"""The delta rule token by token, as the papers print it; slow, and right in any precision.

- DeltaNet (Yang et al. 2024, arXiv 2406.06484): S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ
- Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): S_{t-1} is first decayed by the scalar α_t = exp(g_t)
- Kimi Delta Attention (arXiv 2510.26692): α_t is a vector over the key dimension
- RWKV-7 (Peng et al. 2025, arXiv 2503.14456), diagonal plus low rank: S_t = Diag(α_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ

Everywhere o_t = scale · S_tᵀ q_t, with S a K x V matrix per head.
"""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence in the precision of `state`; arguments as in `archcompass.kernels.delta_rule.delta_rule`."""
    group = v.shape[2] // q.shape[2]
    q, k = (x.to(state.dtype).repeat_interleave(group, dim=2) for x in (q, k))
    write, beta = v.to(state.dtype), beta.to(state.dtype).unsqueeze(-1)
    decay = None if log_decay is None else _per_key(log_decay.to(state.dtype)).exp()
    outputs = []
    for t in range(v.shape[1]):
        if decay is not None:
            state = decay[:, t].unsqueeze(-1) * state
        predicted = _read(k[:, t], state)
        state = state + _outer(beta[:, t] * k[:, t], write[:, t] - predicted)
        outputs.append(scale * _read(q[:, t], state))
    return _stack(outputs, v), state


def dplr_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence in the precision of `state`; arguments as in `archcompass.kernels.delta_rule.dplr`."""
    out_like = v
    q, k, v, a, b, log_decay = (x.to(state.dtype) for x in (q, k, v, a, b, log_decay))
    decay = log_decay.exp()
    outputs = []
    for t in range(v.shape[1]):
        low_rank = _outer(b[:, t], _read(a[:, t], state))
        state = decay[:, t].unsqueeze(-1) * state + low_rank + _outer(k[:, t], v[:, t])
        outputs.append(scale * _read(q[:, t], state))
    return _stack(outputs, out_like), state


def _per_key(log_decay: Tensor) -> Tensor:
    """A scalar decay as a vector of one, which broadcasts over the key dimension."""
    return log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)


def _read(key: Tensor, state: Tensor) -> Tensor:
    """Sᵀ k for every head."""
    return torch.einsum("bhk,bhkv->bhv", key, state)


def _outer(key: Tensor, value: Tensor) -> Tensor:
    return key.unsqueeze(-1) * value.unsqueeze(-2)


def _stack(outputs: list[Tensor], v: Tensor) -> Tensor:
    return torch.stack(outputs, dim=1).to(v.dtype) if outputs else v.new_empty(v.shape)
