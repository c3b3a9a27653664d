"""The torch path of attention, one operator of torch.

Its pieces depend on lengths alone, or on `padding` and `cu_seqlens`, whose values it reads on the host: inside an
operator that is no graph break.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from archcompass.kernels.attention.operator import attention_operator, nothing_seen
from archcompass.kernels.attention.pieces import Visibility, add_sinks, attend, attend_backward, sinks_gradient
from archcompass.kernels.eager import plain_call


def attention_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:
    """Output [batch, new, heads, Dv] and log-sum-exp [batch, new, heads]."""
    serve = _forward if plain_call(q, k, v, sinks) else _attention
    out, lse = serve(q, k, v, sinks, padding, cu_seqlens, see)
    return out, lse.transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:
    """`attend` for every stretch that is one sequence, then the sinks."""
    if padding is None and cu_seqlens is None:
        out, lse = attend(q, k, v, see)
    else:
        out, lse = nothing_seen(q, k, v)
        for row, queries, keys in _spans(q, k, padding, cu_seqlens):
            out[row, queries], lse[row, :, queries] = attend(q[row, queries], k[row, keys], v[row, keys], see)
    return (out, lse) if sinks is None else add_sinks(out, lse, sinks)


def _in_promised_layout(*call: Any) -> tuple[Tensor, Tensor]:
    """`_forward` as the fake tensors promise it."""
    out, lse = _forward(*call)
    return out.contiguous(), lse.contiguous()


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for row, queries, keys in _spans(q, k, padding, cu_seqlens):
        mine = (grad[row, queries], q[row, queries], k[row, keys], v[row, keys], out[row, queries])
        parts = attend_backward(*mine, lse[row, :, queries], see)
        dq[row, queries], dk[row, keys], dv[row, keys] = parts
    d_sinks = q.new_empty(0) if sinks is None else sinks_gradient(grad, out, lse, sinks)
    return dq, dk, dv, d_sinks


def _spans(
    q: Tensor, k: Tensor, padding: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, queries and keys of every stretch that is one sequence."""
    everything = slice(None)
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        for start, end in pairwise(edges):
            yield everything, slice(start, end), slice(start, end)
    elif padding is not None and (left := padding.tolist()) and any(left):
        past = k.shape[1] - q.shape[1]
        for row, start in enumerate(left):
            yield slice(row, row + 1), slice(max(0, start - past), None), slice(start, None)
    else:
        yield everything, everything, everything


_attention = attention_operator("attention_pieces", _in_promised_layout, _backward, backward_products=5)
