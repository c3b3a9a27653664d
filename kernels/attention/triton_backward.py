"""Attention backward on the GPU (FlashAttention-2, arXiv 2307.08691, algorithm 2), scores computed again.

Two kernels and no atomics, so that gradients are the same on every run: one owns a block of keys and walks the queries
that see it, over all heads of its group, for dk and dv; the other owns a block of queries, for dq. Per visible pair and
head dimension 14 FLOPs, two of the seven products being computed twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.attention.intervals import queries_of_key_blocks
from archcompass.kernels.attention.pieces import Visibility
from archcompass.kernels.attention.tiles import BACKWARD_KEYS, BACKWARD_QUERIES
from archcompass.kernels.attention.triton_forward import _program, _scaled, _stretch, dot_precision, score_factors
from archcompass.kernels.tiles import next_power_of_two


@triton.jit
def _weights_and_slope(scores, lse, dp, delta, seen, inner, outer, scale, CAPPED: tl.constexpr):
    """Softmax weights, and the gradient of the raw scores; all arguments broadcast to the tile of pairs."""
    scaled, bent = _scaled(scores, inner, outer, CAPPED)
    weights = tl.where(seen, tl.exp2(scaled - lse), 0.0)
    slope = weights * (dp - delta) * scale
    if CAPPED:
        slope = slope * (1.0 - bent * bent)
    return weights, slope


@triton.jit(do_not_specialize=["new", "keys", "rows"])
def _attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, begin_ptr, end_ptr, dk_ptr, dv_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    new, keys, rows, inner, outer, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    block, kv_head, batch = _program(blocks, HEADS // GROUP)
    start_n = block * BLOCK_N
    ahead = tl.arange(0, BLOCK_N)
    ahead_m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_V)
    n = (start_n + ahead).to(tl.int32)
    there = n < keys
    k_mask = there[:, None] & (d < KEY_DIM)[None, :]
    v_mask = there[:, None] & (w < VALUE_DIM)[None, :]
    k_ptr += batch * k_batch + kv_head * k_head + start_n * k_time
    k = tl.load(k_ptr + ahead[:, None] * k_time + d[None, :], mask=k_mask, other=0.0)
    v_ptr += batch * v_batch + kv_head * v_head + start_n * v_time
    v = tl.load(v_ptr + ahead[:, None] * v_time + w[None, :], mask=v_mask, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    line = batch % rows
    begin = tl.load(begin_ptr + line * blocks + block)
    end = tl.load(end_ptr + line * blocks + block)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(begin, end, BLOCK_M):
            start_m = tl.cast(start, tl.int64)
            valid = start + ahead_m < end
            q_here = q_ptr + batch * q_batch + head * q_head + start_m * q_time
            q_mask = valid[:, None] & (d < KEY_DIM)[None, :]
            q = tl.load(q_here + ahead_m[:, None] * q_time + d[None, :], mask=q_mask, other=0.0)
            grad_here = grad_ptr + ((batch * new + start_m) * HEADS + head) * VALUE_DIM
            grad_mask = valid[:, None] & (w < VALUE_DIM)[None, :]
            grad = tl.load(grad_here + ahead_m[:, None] * (HEADS * VALUE_DIM) + w[None, :], mask=grad_mask, other=0.0)
            stats = (batch * HEADS + head) * new + start_m
            lse = tl.load(lse_ptr + stats + ahead_m, mask=valid, other=0.0) * 1.4426950408889634
            delta = tl.load(delta_ptr + stats + ahead_m, mask=valid, other=0.0)
            first = tl.load(first_ptr + line * new + start_m + ahead_m, mask=valid, other=0)
            last = tl.load(last_ptr + line * new + start_m + ahead_m, mask=valid, other=0)
            seen = (n[:, None] >= first[None, :]) & (n[:, None] < last[None, :])
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            weights, slope = _weights_and_slope(
                scores, lse[None, :], dp, delta[None, :], seen, inner, outer, scale, CAPPED
            )
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
            dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    line = (batch * keys + start_n) * (HEADS // GROUP) + kv_head
    row = ahead[:, None] * (HEADS // GROUP)
    tl.store(dk_ptr + line * KEY_DIM + row * KEY_DIM + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + line * VALUE_DIM + row * VALUE_DIM + w[None, :], dv.to(dv_ptr.dtype.element_ty), mask=v_mask)


@triton.jit(do_not_specialize=["new", "keys", "rows"])
def _attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, dq_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    new, keys, rows, inner, outer, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _program(tl.cdiv(new, BLOCK_M), HEADS)
    start_m = tile * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    ahead = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_V)
    valid = m < new - start_m
    q_mask = valid[:, None] & (d < KEY_DIM)[None, :]
    q_ptr += batch * q_batch + head * q_head + start_m * q_time
    q = tl.load(q_ptr + m[:, None] * q_time + d[None, :], mask=q_mask, other=0.0)
    row = (batch * new + start_m) * HEADS + head
    grad_ptr += row * VALUE_DIM
    grad_mask = valid[:, None] & (w < VALUE_DIM)[None, :]
    grad = tl.load(grad_ptr + m[:, None] * (HEADS * VALUE_DIM) + w[None, :], mask=grad_mask, other=0.0)
    line = (batch % rows) * new + start_m
    first = tl.load(first_ptr + line + m, mask=valid, other=0)
    last = tl.load(last_ptr + line + m, mask=valid, other=0)
    stats = (batch * HEADS + head) * new + start_m
    lse = tl.load(lse_ptr + stats + m, mask=valid, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + stats + m, mask=valid, other=0.0)
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    low, _full_low, _full_high, _before, _ragged = _stretch(first, last, valid, BLOCK_N)
    high = tl.max(tl.where(valid, last, 0), axis=0)
    for start in range(low, high, BLOCK_N):
        n = start + ahead
        there = (n < keys)[:, None]
        k_here = k_ptr + tl.cast(start, tl.int64) * k_time
        k = tl.load(k_here + ahead[:, None] * k_time + d[None, :], mask=there & (d < KEY_DIM)[None, :], other=0.0)
        v_here = v_ptr + tl.cast(start, tl.int64) * v_time
        v = tl.load(v_here + ahead[:, None] * v_time + w[None, :], mask=there & (w < VALUE_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        _weights, slope = _weights_and_slope(
            scores, lse[:, None], dp, delta[:, None], seen, inner, outer, scale, CAPPED
        )
        dq = tl.dot(slope.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr += row * KEY_DIM
    tl.store(dq_ptr + m[:, None] * (HEADS * KEY_DIM) + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=q_mask)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor, last: Tensor,
    see: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches both kernels; arguments as those and the results of `triton_forward.forward`.

    Returns:
        gradients of q, k and v, contiguous.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grad = grad.contiguous()
    batch, new, heads, key_dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    block_d, block_v = next_power_of_two(key_dim), next_power_of_two(value_dim)
    row_bytes = max(block_d, block_v) * q.element_size()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    scalars = (new, keys, first.shape[0], *score_factors(see), see.scale)
    sizes = {
        "HEADS": heads, "GROUP": heads // kv_heads, "CAPPED": see.soft_cap is not None, "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim, "BLOCK_D": block_d, "BLOCK_V": block_v, "PRECISION": dot_precision(q.dtype),
    }  # fmt: skip
    tile = BACKWARD_KEYS.pick(q.device, row_bytes=row_bytes, element=q.element_size())
    begin, end = queries_of_key_blocks(first, last, keys, tile.blocks["BLOCK_N"])
    _attention_backward_keys_kernel[(begin.shape[1] * kv_heads * batch,)](
        q, k, v, grad, lse, delta, first, last, begin, end, dk, dv, *strides, *scalars,
        **sizes, **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    tile = BACKWARD_QUERIES.pick(q.device, row_bytes=row_bytes, element=q.element_size())
    _attention_backward_queries_kernel[(triton.cdiv(new, tile.blocks["BLOCK_M"]) * heads * batch,)](
        q, k, v, grad, lse, delta, first, last, dq, *strides, *scalars,
        **sizes, **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return dq, dk, dv
