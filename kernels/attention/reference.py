"""Softmax attention as the formula: scores, mask, softmax, sum (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

With grouped key-value heads (Ainslie et al. 2023, arXiv 2305.13245), sliding windows (Beltagy et al. 2020, arXiv
2004.05150), absolute chunks (Llama 4), learned sinks that join the softmax and are dropped (gpt-oss; Xiao et al. 2023,
arXiv 2309.17453), and a soft cap on the scores, cap tanh(s / cap) (Gemma 2, arXiv 2408.00118). Any precision; memory
grows with queries times keys.
"""

import torch
from torch import Tensor


def attention_mask(
    new_tokens: int,
    keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    padding: Tensor | None = None,
    key_offset: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """True where the query (row) sees the key (column): [1, new, keys], or [batch, new, keys] with padding [batch].

    Left padding is invisible, and chunks are counted from the first key that is not padding.
    """
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - new_tokens, keys, device=device)[:, None]
    start = torch.zeros(1, 1, 1, dtype=torch.int64, device=device) if padding is None else padding[:, None, None]
    visible = (key >= start) & (query >= start)
    if causal:
        visible = visible & (key <= query)
    if window is not None:
        visible = visible & (key > query - window)
    if chunk is not None:
        absolute = key_offset - start
        visible = visible & ((key + absolute) // chunk == (query + absolute) // chunk)
    return visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ, where visible) v, and the log of the softmax's denominator (sink included).

    Shapes: q [batch, new, heads, D], k [batch, keys, kv_heads, D], v [batch, keys, kv_heads, Dv], visible
    [1 or batch, new, keys], sinks [heads]; returns [batch, new, heads, Dv] and [batch, new, heads]. A query that sees
    nothing gives zeros, and a log-sum-exp of minus infinity unless there is a sink.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    denominator = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        denominator = torch.logaddexp(denominator, sinks[:, None, None].to(denominator.dtype))
    empty = denominator == float("-inf")
    weights = torch.exp(scores - denominator.masked_fill(empty, 0.0))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), denominator.squeeze(-1).transpose(1, 2)
