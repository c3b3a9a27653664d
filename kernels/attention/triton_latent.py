"""Absorbed multi-head latent attention on the GPU: one tile of latents serves as keys and as values.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Forward: the keys in splits, side by side, merged by log-sum-exp; a row of a
tile is a (query, head) pair, because all heads share the latents. Bandwidth-bound for a step. Backward as for attention
in full (`triton_backward`): scores computed again, one kernel for the queries and one for the latents, no atomics. A
latent is key and value at once, so its gradient is one sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.attention.intervals import queries_of_key_blocks
from archcompass.kernels.attention.tiles import LATENT, LATENT_BACKWARD
from archcompass.kernels.attention.triton_decode import keys_per_split, merge, parts, split_count
from archcompass.kernels.attention.triton_forward import LARGE, LOG2_E, _program, dot_precision
from archcompass.kernels.tiles import Tile, next_power_of_two


@triton.jit
def _load_halves(
    row_ptr, there, RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rows of RANK and then ROPE_DIM numbers, as two tiles: the latent part and the rotary part."""
    w = tl.arange(0, BLOCK_V)
    p = tl.arange(0, BLOCK_P)
    latent = tl.load(row_ptr[:, None] + w[None, :], mask=there[:, None] & (w < RANK)[None, :], other=0.0)
    rope = tl.load(row_ptr[:, None] + RANK + p[None, :], mask=there[:, None] & (p < ROPE_DIM)[None, :], other=0.0)
    return latent, rope


@triton.jit
def _store_halves(
    row_ptr, there, latent, rope,
    RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    w = tl.arange(0, BLOCK_V)
    p = tl.arange(0, BLOCK_P)
    kind = row_ptr.dtype.element_ty
    tl.store(row_ptr[:, None] + w[None, :], latent.to(kind), mask=there[:, None] & (w < RANK)[None, :])
    tl.store(row_ptr[:, None] + RANK + p[None, :], rope.to(kind), mask=there[:, None] & (p < ROPE_DIM)[None, :])


@triton.jit(do_not_specialize=["new", "keys", "rows", "keys_per_split"])
def _latent_split_kernel(
    q_ptr, latent_ptr, first_ptr, last_ptr, part_ptr, lse_ptr,
    q_batch, q_time, q_head, latent_batch, latent_time,
    new, keys, rows, keys_per_split, inner,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split, BLOCK_R (query, head) rows: scores from the latent's RANK and ROPE_DIM columns, values its RANK."""
    part = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    tile, _, batch = _program(tl.cdiv(new * HEADS, BLOCK_R), 1)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    query = row // HEADS
    valid = query < new
    w = tl.arange(0, BLOCK_V)
    line = (batch % rows) * new
    first = tl.load(first_ptr + line + query, mask=valid, other=0)
    last = tl.load(last_ptr + line + query, mask=valid, other=0)
    q, q_rope = _load_halves(
        q_ptr + batch * q_batch + row % HEADS * q_head + query * q_time, valid, RANK, ROPE_DIM, BLOCK_V, BLOCK_P
    )
    latent_ptr += batch * latent_batch
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    seeing = valid & (first < last)
    low = tl.maximum(part * keys_per_split, tl.min(tl.where(seeing, first, LARGE), axis=0) // BLOCK_N * BLOCK_N)
    high = tl.minimum((part + 1) * keys_per_split, tl.max(tl.where(seeing, last, 0), axis=0))
    for start in range(low, high, BLOCK_N):
        n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        latent, rope = _load_halves(latent_ptr + n * latent_time, n < keys, RANK, ROPE_DIM, BLOCK_V, BLOCK_P)
        scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION) * inner
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - anchor[:, None])
        kept = tl.exp2(top - anchor)
        total = total * kept + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * kept[:, None], input_precision=PRECISION)
        top = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    at = (batch * new * HEADS + row) * splits + part
    tl.store(part_ptr + at[:, None] * RANK + w[None, :], acc, mask=valid[:, None] & (w < RANK)[None, :])
    tl.store(lse_ptr + at, lse, mask=valid)


@triton.jit(do_not_specialize=["new", "keys", "rows"])
def _latent_backward_queries_kernel(
    q_ptr, latent_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, dq_ptr,
    q_batch, q_time, q_head, latent_batch, latent_time,
    new, keys, rows, inner, scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_R (query, head) rows walk the keys they see."""
    tile, _, batch = _program(tl.cdiv(new * HEADS, BLOCK_R), 1)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    query = row // HEADS
    valid = query < new
    w = tl.arange(0, BLOCK_V)
    line = (batch % rows) * new
    first = tl.load(first_ptr + line + query, mask=valid, other=0)
    last = tl.load(last_ptr + line + query, mask=valid, other=0)
    q, q_rope = _load_halves(
        q_ptr + batch * q_batch + row % HEADS * q_head + query * q_time, valid, RANK, ROPE_DIM, BLOCK_V, BLOCK_P
    )
    at = batch * new * HEADS + row
    grad_mask = valid[:, None] & (w < RANK)[None, :]
    grad = tl.load(grad_ptr + at[:, None] * RANK + w[None, :], mask=grad_mask, other=0.0)
    stats = (batch * HEADS + row % HEADS) * new + query
    lse = tl.load(lse_ptr + stats, mask=valid, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + stats, mask=valid, other=0.0)
    latent_ptr += batch * latent_batch
    dq = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    dq_rope = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    seeing = valid & (first < last)
    low = tl.min(tl.where(seeing, first, LARGE), axis=0) // BLOCK_N * BLOCK_N
    high = tl.max(tl.where(seeing, last, 0), axis=0)
    for start in range(low, high, BLOCK_N):
        n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        latent, rope = _load_halves(latent_ptr + n * latent_time, n < keys, RANK, ROPE_DIM, BLOCK_V, BLOCK_P)
        scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION) * inner
        dp = tl.dot(grad, tl.trans(latent), input_precision=PRECISION)
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        slope = (weights * (dp - delta[:, None]) * scale).to(latent.dtype)
        dq = tl.dot(slope, latent, dq, input_precision=PRECISION)
        dq_rope = tl.dot(slope, rope, dq_rope, input_precision=PRECISION)
    _store_halves(dq_ptr + at * (RANK + ROPE_DIM), valid, dq, dq_rope, RANK, ROPE_DIM, BLOCK_V, BLOCK_P)


@triton.jit(do_not_specialize=["new", "keys", "rows"])
def _latent_backward_keys_kernel(
    q_ptr, latent_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, begin_ptr, end_ptr, dlatent_ptr,
    q_batch, q_time, q_head, latent_batch, latent_time,
    new, keys, rows, inner, scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N latents walk the (query, head) rows that see them."""
    blocks = tl.cdiv(keys, BLOCK_N)
    block, _, batch = _program(blocks, 1)
    w = tl.arange(0, BLOCK_V)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    latent, rope = _load_halves(
        latent_ptr + batch * latent_batch + n * latent_time, n < keys, RANK, ROPE_DIM, BLOCK_V, BLOCK_P
    )
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    total_rope = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    line = batch % rows
    begin = tl.load(begin_ptr + line * blocks + block)
    end = tl.load(end_ptr + line * blocks + block)
    for start in range(begin * HEADS, end * HEADS, BLOCK_R):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_R)
        query = row // HEADS
        valid = query < end
        q, q_rope = _load_halves(
            q_ptr + batch * q_batch + row % HEADS * q_head + query * q_time, valid, RANK, ROPE_DIM, BLOCK_V, BLOCK_P
        )
        at = batch * new * HEADS + row
        grad_mask = valid[:, None] & (w < RANK)[None, :]
        grad = tl.load(grad_ptr + at[:, None] * RANK + w[None, :], mask=grad_mask, other=0.0)
        stats = (batch * HEADS + row % HEADS) * new + query
        lse = tl.load(lse_ptr + stats, mask=valid, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + stats, mask=valid, other=0.0)
        first = tl.load(first_ptr + line * new + query, mask=valid, other=0)
        last = tl.load(last_ptr + line * new + query, mask=valid, other=0)
        scores = tl.dot(latent, tl.trans(q), input_precision=PRECISION)
        scores = tl.dot(rope, tl.trans(q_rope), scores, input_precision=PRECISION) * inner
        dp = tl.dot(latent, tl.trans(grad), input_precision=PRECISION)
        seen = (n[:, None] >= first[None, :]) & (n[:, None] < last[None, :])
        weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
        slope = (weights * (dp - delta[None, :]) * scale).to(q.dtype)
        total = tl.dot(weights.to(grad.dtype), grad, total, input_precision=PRECISION)
        total = tl.dot(slope, q, total, input_precision=PRECISION)
        total_rope = tl.dot(slope, q_rope, total_rope, input_precision=PRECISION)
    at = (batch * keys + n) * (RANK + ROPE_DIM)
    _store_halves(dlatent_ptr + at, n < keys, total, total_rope, RANK, ROPE_DIM, BLOCK_V, BLOCK_P)


def forward(q: Tensor, latent: Tensor, rank: int, first: Tensor, last: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launches the splits and their merge; arguments as `latent.latent_attention`, ends from `intervals`.

    Returns:
        output [batch, new, heads, rank] and log-sum-exp [batch, heads, new], float32.
    """
    q, latent = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, latent))
    batch, new, heads, _ = q.shape
    keys = latent.shape[1]
    tile = LATENT.pick(q.device, row_bytes=next_power_of_two(rank) * q.element_size())
    tiles_of_rows = triton.cdiv(new * heads, tile.blocks["BLOCK_R"])
    splits = split_count(keys, batch * tiles_of_rows)
    part, part_lse = parts(q, splits, rank)
    if part.numel():
        _latent_split_kernel[(tiles_of_rows * batch, splits)](
            q, latent, first, last, part, part_lse, *q.stride()[:3], *latent.stride()[:2],
            new, keys, first.shape[0], keys_per_split(keys, splits, tile.blocks["BLOCK_N"]), scale * LOG2_E,
            **_sizes(q, rank, tile), enable_fp_fusion=True,
        )  # fmt: skip
    return merge(part, part_lse, None, q)


def backward(
    grad: Tensor, q: Tensor, latent: Tensor, out: Tensor, lse: Tensor, rank: int, first: Tensor, last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches both kernels; arguments as those and the results of `forward`.

    Returns:
        gradients of q and of the latents, contiguous.
    """
    q, latent = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, latent))
    grad = grad.contiguous()
    batch, new, heads, _ = q.shape
    keys = latent.shape[1]
    dq, dlatent = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, latent))
    if not q.numel() or not latent.numel():
        return dq.zero_(), dlatent.zero_()
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    tile = LATENT_BACKWARD.pick(q.device)
    strides = (*q.stride()[:3], *latent.stride()[:2])
    scalars = (new, keys, first.shape[0], scale * LOG2_E, scale)
    sizes = _sizes(q, rank, tile)
    begin, end = queries_of_key_blocks(first, last, keys, tile.blocks["BLOCK_N"])
    _latent_backward_keys_kernel[(begin.shape[1] * batch,)](
        q, latent, grad, lse, delta, first, last, begin, end, dlatent, *strides, *scalars, **sizes,
        enable_fp_fusion=True,
    )  # fmt: skip
    _latent_backward_queries_kernel[(triton.cdiv(new * heads, tile.blocks["BLOCK_R"]) * batch,)](
        q, latent, grad, lse, delta, first, last, dq, *strides, *scalars, **sizes, enable_fp_fusion=True
    )
    return dq, dlatent


def _sizes(q: Tensor, rank: int, tile: Tile) -> dict[str, object]:
    """What the kernels are compiled for."""
    heads, width = q.shape[2:]
    return {
        "HEADS": heads, "RANK": rank, "ROPE_DIM": width - rank, "BLOCK_V": next_power_of_two(rank),
        "BLOCK_P": next_power_of_two(width - rank), "PRECISION": dot_precision(q.dtype), **tile.launch(),
    }  # fmt: skip
