"""Attention forward on the GPU: one pass over the keys with an online softmax (FlashAttention-2, arXiv 2307.08691).

A program owns BLOCK_M queries of one head and walks the stretch of keys they see: first the blocks that all of them
see whole, without a mask, then the ragged ends. Scores live in units of log2, so that exp is exp2. Compute-bound: four
FLOPs per visible pair and head dimension, against one read of q, k, v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.attention.pieces import Visibility
from archcompass.kernels.attention.tiles import FORWARD
from archcompass.kernels.tiles import next_power_of_two

LOG2_E = 1.4426950408889634
LARGE = tl.constexpr(2**31 - 1)


def score_factors(see: Visibility) -> tuple[float, float]:
    """(inner, outer): scores in log2 are inner s, or outer tanh(inner s) with a soft cap."""
    if see.soft_cap is None:
        return see.scale * LOG2_E, 1.0
    return see.scale / see.soft_cap, see.soft_cap * LOG2_E


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products take three tf32 products, which keep float32's accuracy on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def _program(tiles, HEADS: tl.constexpr):
    """Tile, head and batch of a program. One long dimension, for CUDA's other two end at 65535 and a batch need not."""
    program = tl.program_id(0)
    head = program // tiles
    return (program % tiles).to(tl.int64), (head % HEADS).to(tl.int64), (head // HEADS).to(tl.int64)


@triton.jit
def _scaled(scores, inner, outer, CAPPED: tl.constexpr):
    """Scores in log2, and tanh of the capped ones for the backward pass."""
    scores = scores * inner
    bent = scores
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * scores) - 1.0
        scores = outer * bent
    return scores, bent


@triton.jit
def _online_step(
    q, acc, top, total, k_ptr, v_ptr, start, keys, first, last, k_step, v_step, inner, outer,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to the running softmax of a block of queries."""
    ahead = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_V)
    n = start + ahead
    there = n < keys
    k_ptr += tl.cast(start, tl.int64) * k_step
    v_ptr += tl.cast(start, tl.int64) * v_step
    if MASKED:
        k = tl.load(
            k_ptr + ahead[None, :] * k_step + d[:, None], mask=there[None, :] & (d < KEY_DIM)[:, None], other=0.0
        )
        v = tl.load(
            v_ptr + ahead[:, None] * v_step + w[None, :], mask=there[:, None] & (w < VALUE_DIM)[None, :], other=0.0
        )
    else:
        if KEY_DIM == BLOCK_D:
            k = tl.load(k_ptr + ahead[None, :] * k_step + d[:, None])
        else:
            k = tl.load(k_ptr + ahead[None, :] * k_step + d[:, None], mask=(d < KEY_DIM)[:, None], other=0.0)
        if VALUE_DIM == BLOCK_V:
            v = tl.load(v_ptr + ahead[:, None] * v_step + w[None, :])
        else:
            v = tl.load(v_ptr + ahead[:, None] * v_step + w[None, :], mask=(w < VALUE_DIM)[None, :], other=0.0)
    scores, _ = _scaled(tl.dot(q, k, input_precision=PRECISION), inner, outer, CAPPED)
    if MASKED:
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    weights = tl.exp2(scores - anchor[:, None])
    kept = tl.exp2(top - anchor)
    total = total * kept + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def _stretch(first, last, valid, BLOCK_N: tl.constexpr):
    """The blocks of keys of a block of queries: [low, full_low) ragged, [full_low, full_high) full, rest ragged."""
    seeing = valid & (first < last)
    low = tl.min(tl.where(seeing, first, LARGE), axis=0) // BLOCK_N * BLOCK_N
    high = tl.max(tl.where(seeing, last, 0), axis=0)
    low = tl.minimum(low, high)
    full_low = (tl.max(tl.where(valid, first, 0), axis=0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_high = tl.min(tl.where(valid, last, LARGE), axis=0) // BLOCK_N * BLOCK_N
    full_low = tl.maximum(full_low, low)
    full_low = tl.where(full_high > full_low, full_low, high)
    full_high = tl.maximum(full_low, full_high)
    ragged_before = (full_low - low + BLOCK_N - 1) // BLOCK_N
    ragged_after = tl.maximum(0, high - full_high + BLOCK_N - 1) // BLOCK_N
    return low, full_low, full_high, ragged_before, ragged_before + ragged_after


@triton.jit(do_not_specialize=["new", "keys", "rows"])
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, sinks_ptr, out_ptr, lse_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    new, keys, rows, inner, outer,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _program(tl.cdiv(new, BLOCK_M), HEADS)
    start_m = tile * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_V)
    valid = m < new - start_m
    line = (batch % rows) * new + start_m
    first = tl.load(first_ptr + line + m, mask=valid, other=0)
    last = tl.load(last_ptr + line + m, mask=valid, other=0)
    q_ptr += batch * q_batch + head * q_head + start_m * q_time
    q = tl.load(q_ptr + m[:, None] * q_time + d[None, :], mask=valid[:, None] & (d < KEY_DIM)[None, :], other=0.0)
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    low, full_low, full_high, before, ragged = _stretch(first, last, valid, BLOCK_N)
    for start in range(full_low, full_high, BLOCK_N):
        acc, top, total = _online_step(
            q, acc, top, total, k_ptr, v_ptr, start, keys, first, last, k_time, v_time, inner, outer,
            False, CAPPED, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    for block in range(ragged):
        start = low + block * BLOCK_N
        if block >= before:
            start = full_high + (block - before) * BLOCK_N
        acc, top, total = _online_step(
            q, acc, top, total, k_ptr, v_ptr, start, keys, first, last, k_time, v_time, inner, outer,
            True, CAPPED, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, sink)
        kept = tl.exp2(top - higher)
        total = total * kept + tl.exp2(sink - higher)
        acc = acc * kept[:, None]
        top = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(
        total == 0.0, float("-inf"), (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    )
    out_ptr += ((batch * new + start_m) * HEADS + head) * VALUE_DIM
    tl.store(
        out_ptr + m[:, None] * (HEADS * VALUE_DIM) + w[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (w < VALUE_DIM)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + (batch * HEADS + head) * new + start_m + m, lse, mask=valid)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, first: Tensor, last: Tensor, see: Visibility
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; `first` and `last` as `intervals` makes them.

    Returns:
        output [batch, new, heads, Dv] and log-sum-exp [batch, heads, new], float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    batch, new, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    out = q.new_empty(batch, new, heads, value_dim)
    lse = q.new_empty(batch, heads, new, dtype=torch.float32)
    if not out.numel():
        return out, lse
    block_d, block_v = next_power_of_two(key_dim), next_power_of_two(value_dim)
    tile = FORWARD.pick(q.device, row_bytes=max(block_d, block_v) * q.element_size(), element=q.element_size())
    inner, outer = score_factors(see)
    _attention_forward_kernel[(triton.cdiv(new, tile.blocks["BLOCK_M"]) * heads * batch,)](
        q, k, v, first, last, sinks, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        new, k.shape[1], first.shape[0], inner, outer,
        HEADS=heads, GROUP=heads // k.shape[2], CAPPED=see.soft_cap is not None, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_D=block_d, BLOCK_V=block_v, PRECISION=dot_precision(q.dtype), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse
