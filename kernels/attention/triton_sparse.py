"""Backward of block-sparse attention on the GPU: scores computed again, each query with its own blocks of keys.

The forward pass is `triton_decode.split` (MoBA, arXiv 2502.13189; NSA, arXiv 2502.11089). Two kernels and no atomics, so
that gradients are the same on every run: one owns a query and walks its blocks, for dq; the other owns a tile of keys and
walks the queries that chose its block, which a sort puts side by side, for dk and dv.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.attention.pieces import Visibility
from archcompass.kernels.attention.tiles import SPARSE_BACKWARD
from archcompass.kernels.attention.triton_backward import _weights_and_slope
from archcompass.kernels.attention.triton_forward import _program, dot_precision, score_factors
from archcompass.kernels.cost import ceil_div
from archcompass.kernels.tiles import next_power_of_two


@triton.jit
def _load_rows(row_ptr, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH numbers as a tile of BLOCK columns."""
    column = tl.arange(0, BLOCK)
    return tl.load(row_ptr[:, None] + column[None, :], mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(row_ptr, there, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = there[:, None] & (column < WIDTH)[None, :]
    tl.store(row_ptr[:, None] + column[None, :], tile.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["new", "keys", "slots"])
def _sparse_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, blocks_ptr, dq_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    new, keys, slots, inner, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SPARSE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query of one key-value head: BLOCK_R rows, of which its group are real."""
    query, kv_head, batch = _program(new, HEADS // GROUP)
    member = tl.arange(0, BLOCK_R)
    valid = member < GROUP
    head = kv_head * GROUP + member
    q = _load_rows(q_ptr + batch * q_batch + query * q_time + head * q_head, valid, KEY_DIM, BLOCK_D)
    at = (batch * new + query) * HEADS + head
    grad = _load_rows(grad_ptr + at * VALUE_DIM, valid, VALUE_DIM, BLOCK_V)
    stats = (batch * HEADS + head) * new + query
    lse = tl.load(lse_ptr + stats, mask=valid, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + stats, mask=valid, other=0.0)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    dq = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    chosen = blocks_ptr + ((batch * new + query) * (HEADS // GROUP) + kv_head) * slots
    for slot in range(slots):
        begin = tl.load(chosen + slot).to(tl.int64) * SPARSE_BLOCK
        end = tl.minimum(begin + SPARSE_BLOCK, tl.where(begin < 0, begin, keys - new + query + 1))
        for start in range(begin, end, BLOCK_N):
            n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr + n * k_time, n < end, KEY_DIM, BLOCK_D)
            v = _load_rows(v_ptr + n * v_time, n < end, VALUE_DIM, BLOCK_V)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            seen = valid[:, None] & (n < end)[None, :]
            _weights, slope = _weights_and_slope(
                scores, lse[:, None], dp, delta[:, None], seen, inner, 1.0, scale, False
            )
            dq = tl.dot(slope.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_rows(dq_ptr + at * KEY_DIM, valid, dq, KEY_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["new", "keys", "slots"])
def _sparse_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, queries_ptr, offsets_ptr, dk_ptr, dv_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    new, keys, slots, inner, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SPARSE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one block walk BLOCK_R (query, head) rows at a time of those that chose it."""
    tiles: tl.constexpr = (SPARSE_BLOCK + BLOCK_N - 1) // BLOCK_N
    blocks = tl.cdiv(keys, SPARSE_BLOCK)
    tile, kv_head, batch = _program(blocks * tiles, HEADS // GROUP)
    block = tile // tiles
    end = tl.minimum((block + 1) * SPARSE_BLOCK, keys)
    n = block * SPARSE_BLOCK + tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr + batch * k_batch + kv_head * k_head + n * k_time, n < end, KEY_DIM, BLOCK_D)
    v = _load_rows(v_ptr + batch * v_batch + kv_head * v_head + n * v_time, n < end, VALUE_DIM, BLOCK_V)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    line = batch * (HEADS // GROUP) + kv_head
    bounds = offsets_ptr + line * (blocks + 1) + block
    last = tl.load(bounds + 1) * GROUP
    for start in range(tl.load(bounds) * GROUP, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = row < last
        query = tl.load(queries_ptr + line * new * slots + row // GROUP, mask=valid, other=0).to(tl.int64)
        head = kv_head * GROUP + row % GROUP
        q = _load_rows(q_ptr + batch * q_batch + query * q_time + head * q_head, valid, KEY_DIM, BLOCK_D)
        grad = _load_rows(grad_ptr + ((batch * new + query) * HEADS + head) * VALUE_DIM, valid, VALUE_DIM, BLOCK_V)
        stats = (batch * HEADS + head) * new + query
        lse = tl.load(lse_ptr + stats, mask=valid, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + stats, mask=valid, other=0.0)
        seen = valid[None, :] & (n[:, None] <= (keys - new + query)[None, :]) & (n < end)[:, None]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        weights, slope = _weights_and_slope(scores, lse[None, :], dp, delta[None, :], seen, inner, 1.0, scale, False)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    at = (batch * keys + n) * (HEADS // GROUP) + kv_head
    _store_rows(dk_ptr + at * KEY_DIM, n < end, dk, KEY_DIM, BLOCK_D)
    _store_rows(dv_ptr + at * VALUE_DIM, n < end, dv, VALUE_DIM, BLOCK_V)


def backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, out: Tensor, lse: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches both kernels.

    Args:
        grad, grad_lse: gradients of `out` [batch, new, heads, Dv] and `lse` [batch, heads, new], as `split` gave them.
        blocks: [batch, new, kv_heads, slots] int32, contiguous.

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
    # d lse / d score is the weight itself: its gradient joins what the softmax takes off every score's.
    delta = ((grad.float() * out.float()).sum(-1).transpose(1, 2) - grad_lse).contiguous()
    inner, _ = score_factors(Visibility(True, None, None, 0, scale, None))
    block_d, block_v = next_power_of_two(key_dim), next_power_of_two(value_dim)
    tile = SPARSE_BACKWARD.pick(q.device, row_bytes=max(block_d, block_v) * q.element_size(), element=q.element_size())
    step = min(tile.blocks["BLOCK_N"], next_power_of_two(block_size))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    scalars = (new, keys, blocks.shape[-1], inner, scale)
    sizes = {
        "HEADS": heads, "GROUP": heads // kv_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d,
        "BLOCK_V": block_v, "SPARSE_BLOCK": block_size, "PRECISION": dot_precision(q.dtype),
        **tile.launch(), "BLOCK_N": step,
    }  # fmt: skip
    _sparse_backward_queries_kernel[(new * kv_heads * batch,)](
        q, k, v, grad, lse, delta, blocks, dq, *strides, *scalars,
        **{**sizes, "BLOCK_R": next_power_of_two(heads // kv_heads)}, enable_fp_fusion=True,
    )  # fmt: skip
    count = ceil_div(keys, block_size)
    queries, offsets = queries_of_blocks(blocks, count)
    _sparse_backward_keys_kernel[(count * ceil_div(block_size, step) * kv_heads * batch,)](
        q, k, v, grad, lse, delta, queries, offsets, dk, dv, *strides, *scalars, **sizes, enable_fp_fusion=True
    )
    return dq, dk, dv


def queries_of_blocks(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The queries that chose each of `count` blocks, side by side: int32 [batch, kv_heads, new slots], and where those
    of a block begin and end, int32 [batch, kv_heads, count + 1]. Reads no value on the host."""
    batch, _, kv_heads, slots = blocks.shape
    chosen, order = blocks.permute(0, 2, 1, 3).flatten(2).sort(dim=-1, stable=True)
    edges = torch.arange(count + 1, device=blocks.device, dtype=blocks.dtype).expand(batch, kv_heads, -1).contiguous()
    return (order // slots).to(torch.int32), torch.searchsorted(chosen, edges, out_int32=True)
