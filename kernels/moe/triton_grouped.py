"""Grouped matrix products on the GPU, one group per expert, rows gathered and scattered on the way.

No padded copies: tiles of BLOCK_M rows are laid over each expert's stretch of the sorted (token, choice) pairs, a tile
reads its tokens through the sorting order and writes back through it (ScatterMoE, arXiv 2403.08245). The sum over a
token's choices is taken afterwards, in a fixed order, so that results are the same on every run; atomics would not be.
Nothing is read on the host: the grid is the largest it can be, and programs without a tile leave at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.moe.activations import Activation
from archcompass.kernels.moe.tiles import ROWS, WEIGHTS

NEIGHBOURS = tl.constexpr(8)  # tiles of rows that share a tile of weights in the L2 cache


@dataclass(frozen=True, slots=True)
class Sorted:
    """(token, choice) pairs by expert: `order` [pairs] sorts them, expert e owns offsets[e] : offsets[e + 1]."""

    order: Tensor
    offsets: Tensor

    @property
    def experts(self) -> int:
        return self.offsets.shape[0] - 1


def by_expert(experts: Tensor, count: int) -> Sorted:
    """Sorts the pairs of `experts` [tokens, k]; no value is read on the host."""
    values, order = experts.flatten().to(torch.int32).sort(stable=True)
    edges = torch.arange(count + 1, device=experts.device, dtype=torch.int32)
    return Sorted(order.to(torch.int32), torch.searchsorted(values, edges, out_int32=True))


@triton.jit
def _pointwise(x, alpha, KIND: tl.constexpr):
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "swish":
        y = x * tl.sigmoid(alpha * x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        y = tl.maximum(x, 0.0)
    elif KIND == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        y = x
    return y


@triton.jit(do_not_specialize=["tiles_m"])
def _grouped_rows_kernel(
    a_ptr, b_ptr, bias_ptr, weights_ptr, order_ptr, offsets_ptr, tile_expert_ptr, tile_start_ptr, out_ptr,
    a_row, b_expert, b_n, b_k, tiles_m, alpha, limit, up_offset,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, SCALE_INPUT: tl.constexpr, SCALE_OUTPUT: tl.constexpr,
    GATED: tl.constexpr, LIMITED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row] = act(A[token of row] · B[expert]ᵀ + bias), rows in sorted order or scattered back to (token, choice)."""
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    band = program // (NEIGHBOURS * tiles_n)
    height = tl.minimum(tiles_m - band * NEIGHBOURS, NEIGHBOURS)
    inside = program % (NEIGHBOURS * tiles_n)
    tile = band * NEIGHBOURS + inside % height
    start = tl.load(tile_start_ptr + tile)
    if start < 0:
        return
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    row = start + tl.arange(0, BLOCK_M)
    valid = row < tl.load(offsets_ptr + expert + 1)
    pair = tl.load(order_ptr + row, mask=valid, other=0)
    source = (pair // TOP_K if GATHER else row).to(tl.int64)
    n = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    kk = tl.arange(0, BLOCK_K)
    a_at = a_ptr + source[:, None] * a_row + kk[None, :]
    b_at = b_ptr + expert * b_expert + n.to(tl.int64)[None, :] * b_n + kk[:, None] * b_k
    in_n = (n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED else acc
    if SCALE_INPUT or SCALE_OUTPUT:
        weight = tl.load(weights_ptr + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
    for k in range(0, K, BLOCK_K):
        in_k = kk < K - k
        a = tl.load(a_at, mask=valid[:, None] & in_k[None, :], other=0.0)
        if SCALE_INPUT:
            a = (a.to(tl.float32) * weight).to(a.dtype)
        b = tl.load(b_at, mask=in_n & in_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if GATED:
            b = tl.load(b_at + tl.cast(N, tl.int64) * b_n, mask=in_n & in_k[:, None], other=0.0)
            up = tl.dot(a, b, up, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * b_k
    if bias_ptr is not None:
        bias_at = bias_ptr + expert * (2 * N if GATED else N) + n
        acc += tl.load(bias_at, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_at + N, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if LIMITED:
            acc = tl.minimum(acc, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        acc = _pointwise(acc, alpha, ACTIVATION) * (up + up_offset)
    else:
        acc = _pointwise(acc, alpha, ACTIVATION)
    if SCALE_OUTPUT:
        acc *= weight
    target = (pair if SCATTER else row).to(tl.int64)
    tl.store(out_ptr + target[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & in_n)


@triton.jit
def _grouped_weights_kernel(
    a_ptr, b_ptr, weights_ptr, order_ptr, offsets_ptr, out_ptr, a_row, b_row,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[expert] = Σ over its rows of A[row]ᵀ B[row], [N, K]; zeros for an idle expert."""
    tiles_k = (K + BLOCK_K - 1) // BLOCK_K
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    kk = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(tl.load(offsets_ptr + expert), end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        valid = row < end
        pair = tl.load(order_ptr + row, mask=valid, other=0)
        a_source = (pair // TOP_K if GATHER_A else row).to(tl.int64)
        b_source = (pair // TOP_K if GATHER_B else row).to(tl.int64)
        a = tl.load(a_ptr + a_source[:, None] * a_row + n[None, :], mask=valid[:, None] & (n < N)[None, :], other=0.0)
        b = tl.load(b_ptr + b_source[:, None] * b_row + kk[None, :], mask=valid[:, None] & (kk < K)[None, :], other=0.0)
        if SCALE_A or SCALE_B:
            weight = tl.load(weights_ptr + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
            if SCALE_A:
                a = (a.to(tl.float32) * weight).to(a.dtype)
            if SCALE_B:
                b = (b.to(tl.float32) * weight).to(b.dtype)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    at = expert * N * K + n.to(tl.int64)[:, None] * K + kk[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (kk < K)[None, :])


def grouped_rows(
    a: Tensor, b: Tensor, groups: Sorted, *, top_k: int, gather: bool, scatter: bool,
    bias: Tensor | None = None, weights: Tensor | None = None, scale: str = "", activation: Activation | None = None,
) -> Tensor:  # fmt: skip
    """A[row] · B[expert of row]ᵀ for every pair: the forward product.

    Args:
        a: [tokens, K] with `gather`, else [pairs, K] in sorted order.
        b: [E, N, K], or with a gated activation [E, 2 N, K]; any strides, so a transposed view will do.
        scatter: write rows back to their (token, choice) place; otherwise they stay sorted.
        bias: [E, N] or [E, 2 N].
        weights: [tokens, k], which multiply "input" or "output" as `scale` says.

    Returns:
        [pairs, N] in a's type.
    """
    pairs = groups.order.shape[0]
    gated = activation is not None and activation.gated
    n = b.shape[1] // 2 if gated else b.shape[1]
    out = a.new_empty(pairs, n)
    if not pairs:
        return out
    tile = ROWS.pick(a.device, rows_per_expert=triton.cdiv(pairs, groups.experts), element=a.element_size())
    tile_expert, tile_start = _tiles(groups, pairs, tile.blocks["BLOCK_M"])
    tiles_m = tile_start.shape[0]
    a = a if a.stride(-1) == 1 else a.contiguous()
    bias = None if bias is None else bias.contiguous()
    limit = None if activation is None else activation.limit
    _grouped_rows_kernel[(tiles_m * triton.cdiv(n, tile.blocks["BLOCK_N"]),)](
        a, b, bias, weights, groups.order, groups.offsets, tile_expert, tile_start, out, a.stride(0), *b.stride(),
        tiles_m, 1.0 if activation is None else float(activation.alpha), float(limit or 0.0),
        0.0 if activation is None else float(activation.up_offset),
        N=n, K=b.shape[2], TOP_K=top_k, GATHER=gather, SCATTER=scatter, SCALE_INPUT=scale == "input",
        SCALE_OUTPUT=scale == "output", GATED=gated, LIMITED=limit is not None,
        ACTIVATION="" if activation is None else activation.name, PRECISION=_precision(a.dtype),
        **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def grouped_weights(
    a: Tensor, b: Tensor, groups: Sorted, *, top_k: int, gather_a: bool = False, gather_b: bool = False,
    weights: Tensor | None = None, scale: str = "",
) -> Tensor:  # fmt: skip
    """Σ over each expert's rows of A[row]ᵀ B[row], [E, N, K]: the gradient of a weight. `scale` names "a" or "b"."""
    n, k = a.shape[1], b.shape[1]
    out = a.new_empty(groups.experts, n, k)
    pairs = groups.order.shape[0]
    tile = WEIGHTS.pick(a.device, rows_per_expert=triton.cdiv(pairs, groups.experts), element=a.element_size())
    grid = (triton.cdiv(n, tile.blocks["BLOCK_N"]) * triton.cdiv(k, tile.blocks["BLOCK_K"]), groups.experts)
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    _grouped_weights_kernel[grid](
        a, b, weights, groups.order, groups.offsets, out, a.stride(0), b.stride(0),
        N=n, K=k, TOP_K=top_k, GATHER_A=gather_a, GATHER_B=gather_b, SCALE_A=scale == "a", SCALE_B=scale == "b",
        PRECISION=_precision(a.dtype), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _tiles(groups: Sorted, pairs: int, block: int) -> tuple[Tensor, Tensor]:
    """Expert and first row of every tile; -1 where there is none. At most one ragged tile per expert."""
    count = min(pairs, triton.cdiv(pairs, block) + groups.experts)
    sizes = groups.offsets.diff()
    ends = ((sizes + block - 1) // block).cumsum(0, dtype=torch.int32)
    tile = torch.arange(count, device=sizes.device, dtype=torch.int32)
    expert = torch.searchsorted(ends, tile, right=True, out_int32=True)
    known = expert.clamp(max=groups.experts - 1)
    before = ends[known] - (sizes[known] + block - 1) // block
    start = groups.offsets[known] + (tile - before) * block
    return known, start.masked_fill(expert >= groups.experts, -1).to(torch.int32)


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"
