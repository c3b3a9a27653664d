"""Decayed linear attention as the papers print it: one token at a time.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
    o_t = scale S_t^T q_t                                       inclusive: the token sees itself
    o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T q_t             exclusive, with the bonus u of RWKV-6

Katharopoulos et al. 2020 (no decay), Sun et al. 2023 (RetNet), Dao and Gu 2024 (Mamba-2), Yang et al. 2024 (GLA), Peng
et al. 2024 (RWKV-6). The reference defines what is right; it is slow, and runs in any precision.
"""

import torch
from torch import Tensor


def reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor | None, exclusive: bool, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence.

    Args:
        q: queries, [batch, time, heads, K]; k: keys, likewise; v: values, [batch, time, heads, V].
        decay: log decay, broadcastable to [batch, time, heads, K].
        bonus: weight of the current token, [heads, K], or None.
        exclusive: whether a token reads the state before it is written.
        scale: factor of the output.
        state: the state before the first token, [batch, heads, K, V].

    Returns:
        outputs [batch, time, heads, V], in the dtype of the state, and the state after the last token.
    """
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    forget = decay.to(state.dtype).exp().expand(k.shape)
    outputs = []
    for t in range(q.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        before, state = state, forget[:, t, :, :, None] * state + written
        seen = state
        if exclusive:
            seen = before if bonus is None else before + bonus.to(state.dtype)[:, :, None] * written
        outputs.append(scale * (q[:, t, :, :, None] * seen).sum(dim=-2))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state
