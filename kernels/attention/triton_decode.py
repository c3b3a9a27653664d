"""Attention for few queries and many keys on the GPU: the keys in splits, side by side, merged by log-sum-exp.

FlashDecoding (Dao et al. 2023). All heads of a key-value head are rows of one tile, so each key is read once. A split
may also be a list of blocks of keys, chosen per query, which is block-sparse attention (MoBA, arXiv 2502.13189; NSA,
arXiv 2502.11089) over the same merge. Bandwidth-bound: a step reads every key and value once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.attention.pieces import Visibility
from archcompass.kernels.attention.tiles import SPLIT
from archcompass.kernels.attention.triton_forward import LARGE, _online_step, dot_precision, score_factors
from archcompass.kernels.cost import ceil_div
from archcompass.kernels.tiles import next_power_of_two

MOST_ROWS = 64
LEAST_KEYS = 256  # of a split: below, the merge costs more than the split saves
MOST_SPLITS = 64
PROGRAMS_WANTED = 264  # two for each multiprocessor of an H100


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether the queries are few enough to be rows of one tile."""
    return q.shape[1] * (q.shape[2] // max(1, k.shape[2])) <= MOST_ROWS


def split_count(keys: int, programs: int) -> int:
    """How many splits fill the GPU, each of at least LEAST_KEYS keys."""
    return max(1, min(MOST_SPLITS, keys // LEAST_KEYS, PROGRAMS_WANTED // max(1, programs)))


@triton.jit(do_not_specialize=["new", "keys", "rows", "keys_per_split", "slots"])
def _attention_split_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, blocks_ptr, part_ptr, lse_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    new, keys, rows, keys_per_split, slots, inner, outer,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    SPARSE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one key-value head: all queries (dense), or one (sparse)."""
    part = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    kv_head = tl.program_id(0).to(tl.int64) % (HEADS // GROUP)
    batch = tl.program_id(0).to(tl.int64) // (HEADS // GROUP)
    row = tl.arange(0, BLOCK_R)
    query = row // GROUP
    valid = query < new
    if SPARSE_BLOCK:
        valid = query < 1
        query += batch % new
        chosen = blocks_ptr + (batch * (HEADS // GROUP) + kv_head) * slots
        batch = batch // new
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_V)
    line = (batch % rows) * new
    first = tl.load(first_ptr + line + query, mask=valid, other=0)
    last = tl.load(last_ptr + line + query, mask=valid, other=0)
    at = batch * q_batch + head[:, None] * q_head + query[:, None] * q_time + d[None, :]
    q = tl.load(q_ptr + at, mask=valid[:, None] & (d < KEY_DIM)[None, :], other=0.0)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    if SPARSE_BLOCK:
        per_split = (slots + splits - 1) // splits
        for slot in range(part * per_split, tl.minimum(slots, (part + 1) * per_split)):
            block = tl.load(chosen + slot)
            if block >= 0:
                for offset in range(0, SPARSE_BLOCK, BLOCK_N):
                    acc, top, total = _online_step(
                        q, acc, top, total, k_ptr, v_ptr, block * SPARSE_BLOCK + offset, keys, first,
                        tl.minimum(last, (block + 1) * SPARSE_BLOCK), k_time, v_time, inner, outer,
                        True, CAPPED, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
                    )  # fmt: skip
    else:
        seeing = valid & (first < last)
        low = tl.maximum(part * keys_per_split, tl.min(tl.where(seeing, first, LARGE), axis=0) // BLOCK_N * BLOCK_N)
        high = tl.minimum((part + 1) * keys_per_split, tl.max(tl.where(seeing, last, 0), axis=0))
        for start in range(low, high, BLOCK_N):
            acc, top, total = _online_step(
                q, acc, top, total, k_ptr, v_ptr, start, keys, first, last, k_time, v_time, inner, outer,
                True, CAPPED, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
            )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    at = ((batch * new + query) * HEADS + head) * splits + part
    tl.store(part_ptr + at[:, None] * VALUE_DIM + w[None, :], acc, mask=valid[:, None] & (w < VALUE_DIM)[None, :])
    tl.store(lse_ptr + at, lse, mask=valid)


@triton.jit(do_not_specialize=["new", "splits"])
def _attention_merge_kernel(
    part_ptr, part_lse_ptr, sinks_ptr, out_ptr, lse_ptr, new, splits,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Splits of one (batch, query, head) as one softmax, the sink joining."""
    at = tl.program_id(0).to(tl.int64)
    head = at % HEADS
    s = tl.arange(0, BLOCK_S)
    w = tl.arange(0, BLOCK_V)
    lse = tl.load(part_lse_ptr + at * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - anchor), axis=0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - anchor)
    total_or_one = tl.where(total == 0.0, 1.0, total)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for split in range(splits):
        one = at * splits + split
        share = tl.exp2(tl.load(part_lse_ptr + one) - anchor) / total_or_one
        acc += share * tl.load(part_ptr + one * VALUE_DIM + w, mask=w < VALUE_DIM, other=0.0)
    tl.store(out_ptr + at * VALUE_DIM + w, acc.to(out_ptr.dtype.element_ty), mask=w < VALUE_DIM)
    lse = tl.where(total == 0.0, float("-inf"), (anchor + tl.log2(total_or_one)) * 0.6931471805599453)
    batch = at // (new * HEADS)
    query = at // HEADS % new
    tl.store(lse_ptr + (batch * HEADS + head) * new + query, lse)


def split(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, first: Tensor, last: Tensor, see: Visibility,
    blocks: Tensor | None = None, block_size: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the split and the merge.

    Args:
        blocks: [batch, new, kv_heads, slots] int32 blocks of `block_size` keys for each query, -1 for none; None for
            all keys, and then few queries (`suits`).

    Returns:
        output [batch, new, heads, Dv] and log-sum-exp [batch, heads, new], float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, new, heads, key_dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    group = heads // kv_heads
    tiles_of_queries = 1 if blocks is None else new
    slots = 0 if blocks is None else blocks.shape[-1]
    splits = split_count(keys if blocks is None else slots * block_size, batch * kv_heads * tiles_of_queries)
    splits = splits if blocks is None else min(splits, max(1, slots))
    part, part_lse = parts(q, splits, value_dim)
    if part.numel():
        block_d, block_v = next_power_of_two(key_dim), next_power_of_two(value_dim)
        block_r = next_power_of_two(group * (new if blocks is None else 1))
        tile = SPLIT.pick(q.device, row_bytes=max(block_d, block_v) * q.element_size(), rows=block_r)
        step = tile.blocks["BLOCK_N"] if blocks is None else min(tile.blocks["BLOCK_N"], next_power_of_two(block_size))
        inner, outer = score_factors(see)
        _attention_split_kernel[(kv_heads * tiles_of_queries * batch, splits)](
            q, k, v, first, last, blocks, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            new, keys, first.shape[0], keys_per_split(keys, splits, step), slots, inner, outer,
            HEADS=heads, GROUP=group, CAPPED=see.soft_cap is not None, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_R=block_r, PRECISION=dot_precision(q.dtype),
            SPARSE_BLOCK=block_size, **{**tile.launch(), "BLOCK_N": step}, enable_fp_fusion=True,
        )  # fmt: skip
    return merge(part, part_lse, sinks, q)


def merge(part: Tensor, part_lse: Tensor, sinks: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Splits [batch, new, heads, splits, Dv] and their log-sum-exp (base 2) as one: output in `like`'s type, and its
    natural log-sum-exp [batch, heads, new]."""
    batch, new, heads, splits, value_dim = part.shape
    sinks = None if sinks is None else sinks.contiguous()
    out = like.new_empty(batch, new, heads, value_dim)
    lse = like.new_empty(batch, heads, new, dtype=torch.float32)
    if batch * new * heads:
        _attention_merge_kernel[(batch * new * heads,)](
            part, part_lse, sinks, out, lse, new, splits, HEADS=heads, VALUE_DIM=value_dim,
            BLOCK_V=next_power_of_two(value_dim), BLOCK_S=next_power_of_two(splits, 1), num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def parts(q: Tensor, splits: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Room for what the splits find: output [batch, new, heads, splits, Dv] and log-sum-exp, float32."""
    batch, new, heads, _ = q.shape
    part = q.new_empty(batch, new, heads, splits, value_dim, dtype=torch.float32)
    return part, q.new_empty(batch, new, heads, splits, dtype=torch.float32)


def keys_per_split(keys: int, splits: int, block: int) -> int:
    """Whole blocks of keys for each split."""
    return ceil_div(ceil_div(keys, splits), block) * block
