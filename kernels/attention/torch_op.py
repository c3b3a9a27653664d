"""The torch path of attention as one operator, so that torch.compile, autograd and counters see it whole.

Its pieces depend on lengths alone, or on `padding` and `cu_seqlens`, whose values it reads on the host: inside an
operator that is no graph break.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.attention.cost import visible_pairs
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
    if plain_call(q, k, v, sinks):
        out, lse = _forward(q, k, v, sinks, padding, cu_seqlens, see)
        return out, lse.transpose(1, 2)
    settings = (see.causal, see.window, see.chunk, see.key_offset, see.scale, see.soft_cap)
    out, lse = _attention(q, k, v, sinks, padding, cu_seqlens, *settings)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("archcompass::attention_pieces", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    key_offset: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
    out, lse = _forward(q, k, v, sinks, padding, cu_seqlens, see)
    return out.contiguous(), lse.contiguous()  # the layout that the fake tensors promise


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v)


@torch.library.custom_op("archcompass::attention_pieces_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    key_offset: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for row, queries, keys in _spans(q, k, padding, cu_seqlens):
        mine = (grad[row, queries], q[row, queries], k[row, keys], v[row, keys], out[row, queries])
        parts = attend_backward(*mine, lse[row, :, queries], see)
        dq[row, queries], dk[row, keys], dv[row, keys] = parts
    d_sinks = q.new_empty(0) if sinks is None else sinks_gradient(grad, out, lse, sinks)
    return dq, dk, dv, d_sinks


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, *rest: Any) -> Any:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, padding, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, sinks, padding, cu_seqlens)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, d_sinks = _attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    has_sinks = ctx.saved_tensors[5] is not None
    return (*tensors, d_sinks if has_sinks else None, *[None] * (2 + len(ctx.settings)))


_attention.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.archcompass.attention_pieces)
def _flops(
    q: Any,
    k: Any,
    v: Any,
    sinks: Any,
    padding: Any,
    cu_seqlens: Any,
    causal: bool,
    window: int | None,
    chunk: int | None,
    key_offset: int,
    *_: Any,
    **__: Any,
) -> int:
    """Visible pairs, as `attention_cost`; padding and packing, whose values a counter does not see, count in full."""
    pairs = visible_pairs(q[1], k[1], causal, window, chunk, key_offset)
    return int(2 * q[0] * q[2] * pairs * (q[3] + v[3]))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:
    if padding is None and cu_seqlens is None:
        out, lse = attend(q, k, v, see)
    else:
        out, lse = _empty(q, v)
        for row, queries, keys in _spans(q, k, padding, cu_seqlens):
            out[row, queries], lse[row, :, queries] = attend(q[row, queries], k[row, keys], v[row, keys], see)
    return (out, lse) if sinks is None else add_sinks(out, lse, sinks)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of queries that see nothing."""
    batch, new, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((batch, heads, new), float("-inf"), dtype=wide, device=q.device)
    return q.new_zeros(batch, new, heads, v.shape[-1]), lse


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
