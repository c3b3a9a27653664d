"""What comes before and after the state pass on the GPU, forward: one program per chunk and head.

    running    c, the running sum of the log decay inside each chunk
    scores     L (strict, with beta) and A, under one decay per head
    vector     the same under a decay per key dimension: products of 16 x 16 blocks anchored at the row block's start, where
               both exponents are at most 0, and on the diagonal blocks the sums themselves
    writes     W = T (rows), U = T (target), and the keys decayed to the chunk's end
    output     O = (scale Q exp(c)) S + A Z

Tokens are read where they lie, [tokens, heads, D]; a table gives each chunk's first token and length, so a batch and
packed sequences are one case. Rows past a chunk's length read as zeros, which write nothing. Backward: triton_gradients.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.decay import STRONGEST_DECAY
from archcompass.kernels.delta_rule.tiles import OUTPUT, RUNNING, SCORES, VECTOR_SCORES, WRITES
from archcompass.kernels.delta_rule.triton_passes import BLOCK, precision

STRONGEST = STRONGEST_DECAY[torch.float32]


class Chunks(NamedTuple):
    """Where the chunks of every sequence lie.

    size: C, tokens of a chunk.
    first: first token of each chunk among all tokens, int64.
    length: tokens in each chunk, int32; less than C for the last of a sequence.
    bounds: chunks of each sequence, [sequences + 1], int32.
    """

    size: int
    first: Tensor
    length: Tensor
    bounds: Tensor


@triton.jit
def _running_kernel(
    g_ptr, running_ptr, first_ptr, length_ptr, heads, strongest,
    C: tl.constexpr, KD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, k = tl.arange(0, C), tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(first_ptr + n) + i
    inside = (i < tl.load(length_ptr + n))[:, None] & (k < KD)[None, :]
    g = tl.load(g_ptr + (token[:, None] * heads + head) * KD + k[None, :], mask=inside, other=0.0).to(tl.float32)
    running = tl.cumsum(tl.maximum(g, strongest), axis=0)
    at = ((n * heads + head) * C + i[:, None]) * KD + k[None, :]
    tl.store(running_ptr + at, running, mask=(i < C)[:, None] & (k < KD)[None, :])


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, beta_ptr, running_ptr, strict_ptr, mix_ptr, first_ptr, length_ptr, heads, group, scale,
    C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, C)
    token, inside = tl.load(first_ptr + n) + i, i < tl.load(length_ptr + n)
    row = (token * (heads // group) + head // group) * K
    among, across = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (column < K)[None, :]
        key = tl.load(k_ptr + row[:, None] + column[None, :], mask=mask, other=0.0)
        query = tl.load(q_ptr + row[:, None] + column[None, :], mask=mask, other=0.0)
        among += tl.dot(key, tl.trans(key), input_precision=PRECISION)
        across += tl.dot(query, tl.trans(key), input_precision=PRECISION)
    beta = tl.load(beta_ptr + token * heads + head, mask=inside, other=0.0).to(tl.float32)
    among *= beta[:, None]
    across *= scale
    matrix = n * heads + head
    if running_ptr is not None:
        running = tl.load(running_ptr + matrix * C + i)
        ratio = tl.exp(tl.minimum(running[:, None] - running[None, :], 0.0))
        among *= ratio
        across *= ratio
    at = matrix * C * C + i[:, None] * C + i[None, :]
    tl.store(strict_ptr + at, tl.where(i[:, None] > i[None, :], among, 0.0))
    tl.store(mix_ptr + at, tl.where(i[:, None] >= i[None, :], across, 0.0).to(mix_ptr.dtype.element_ty))


@triton.jit
def _log_decay_of_rows(running_ptr, base, i, k, K: tl.constexpr, BEFORE: tl.constexpr):
    """Running log decay of rows, or with BEFORE that of the row above each."""
    row = i - 1 if BEFORE else i
    mask = (row >= 0)[:, None] & (k < K)[None, :]
    return tl.load(running_ptr + base + row[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def _vector_scores_kernel(
    x_ptr, y_ptr, weight_ptr, running_ptr, scores_ptr, first_ptr, length_ptr, heads, group, scale,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, STRICT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · weight_i · Σ_k x_ik y_jk exp(c_i - c_j) for a block of rows against all columns before them."""
    n, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    matrix = n * heads + head
    lane = tl.arange(0, BLOCK)
    i = block * BLOCK + lane
    first, length = tl.load(first_ptr + n), tl.load(length_ptr + n)
    base = matrix * C * K
    stride = (heads // group) * K
    origin = first * stride + (head // group) * K
    weight = tl.full((BLOCK,), 1.0, tl.float32) * scale
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + (first + i) * heads + head, mask=i < length, other=0.0).to(tl.float32)
    out = scores_ptr + matrix * C * C + i[:, None] * C
    for earlier in range(block):
        j = earlier * BLOCK + lane
        scores = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_k = (k < K)[None, :]
            anchor = tl.load(running_ptr + base + (block * BLOCK - 1) * K + k, mask=k < K, other=0.0)[None, :]
            x = tl.load(x_ptr + origin + i[:, None] * stride + k[None, :], mask=(i < length)[:, None] & in_k, other=0.0)
            y = tl.load(y_ptr + origin + j[:, None] * stride + k[None, :], mask=(j < length)[:, None] & in_k, other=0.0)
            late = tl.exp(_log_decay_of_rows(running_ptr, base, i, k, K, BEFORE) - anchor)
            early = tl.exp(anchor - _log_decay_of_rows(running_ptr, base, j, k, K, False))
            x, y = x.to(tl.float32) * late, y.to(tl.float32) * early
            scores += tl.dot(x, tl.trans(y), input_precision=PRECISION)
        tl.store(out + j[None, :], (scores * weight[:, None]).to(scores_ptr.dtype.element_ty))
    scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = (k < K)[None, :]
        x = tl.load(x_ptr + origin + i[:, None] * stride + k[None, :], mask=(i < length)[:, None] & in_k, other=0.0)
        x = x.to(tl.float32)
        running = _log_decay_of_rows(running_ptr, base, i, k, K, BEFORE)
        y = tl.load(y_ptr + origin + i[:, None] * stride + k[None, :], mask=(i < length)[:, None] & in_k, other=0.0)
        apart = running[:, None, :] - _log_decay_of_rows(running_ptr, base, i, k, K, False)[None, :, :]
        products = x[:, None, :] * y.to(tl.float32)[None, :, :] * tl.exp(tl.minimum(apart, 0.0))
        scores += tl.sum(products, axis=2)
    keep = lane[:, None] > lane[None, :] if STRICT else lane[:, None] >= lane[None, :]
    scores = tl.where(keep, scores * weight[:, None], 0.0)
    tl.store(out + i[None, :], scores.to(scores_ptr.dtype.element_ty))
    for later in range(block + 1, C // BLOCK):
        tl.store(out + later * BLOCK + lane[None, :], tl.zeros((BLOCK, BLOCK), scores_ptr.dtype.element_ty))


@triton.jit
def _writes_kernel(
    inverse_ptr, rows_ptr, tail_keys_ptr, value_keys_ptr, v_ptr, beta_ptr, running_ptr, read_ptr,
    w_ptr, u_ptr, tail_ptr, first_ptr, length_ptr, heads, group,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W, U and the tail of one chunk and head.

    With beta the rows are -beta K exp(c) and the target is beta V; without (dplr), a exp(c of the token before), the
    target is read_ptr (A_ak) times V, and the keys of the values follow in the tail's second half.
    """
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    matrix = n * heads + head
    i = tl.arange(0, C)
    token, length = tl.load(first_ptr + n) + i, tl.load(length_ptr + n)
    inside = i < length
    square = matrix * C * C + i[:, None] * C + i[None, :]
    inverse = tl.load(inverse_ptr + square).to(v_ptr.dtype.element_ty)
    factor = tl.full((C,), 1.0, tl.float32)
    if beta_ptr is not None:
        factor = -tl.load(beta_ptr + token * heads + head, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (k < K)[None, :]
        at = ((token * (heads // group) + head // group) * K)[:, None] + k[None, :]
        rows = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        keys = tl.load(tail_keys_ptr + at, mask=mask, other=0.0).to(tl.float32)
        until_end = tl.full((C, 1), 1.0, tl.float32)
        if running_ptr is not None:
            if VECTOR:
                rows *= tl.exp(_log_decay_of_rows(running_ptr, matrix * C * K, i, k, K, beta_ptr is None))
                running = _log_decay_of_rows(running_ptr, matrix * C * K, i, k, K, False)
                whole = tl.load(running_ptr + matrix * C * K + (C - 1) * K + k, mask=k < K, other=0.0)
                until_end = tl.exp(whole[None, :] - running)
            else:
                running = tl.load(running_ptr + matrix * C + i)
                whole = tl.load(running_ptr + matrix * C + C - 1)
                rows *= tl.exp(running)[:, None]
                until_end = tl.exp(whole - running)[:, None]
        w = tl.dot(inverse, rows.to(inverse.dtype), input_precision=PRECISION)
        out = i[:, None] * K + k[None, :]
        tl.store(w_ptr + matrix * C * K + out, w.to(w_ptr.dtype.element_ty), mask=(k < K)[None, :])
        keys *= until_end
        tl.store(tail_ptr + matrix * TAIL * K + out, keys.to(tail_ptr.dtype.element_ty), mask=(k < K)[None, :])
        if value_keys_ptr is not None:
            keys = tl.load(value_keys_ptr + at, mask=mask, other=0.0).to(tl.float32) * until_end
            lower = tail_ptr + (matrix * TAIL + C) * K + out
            tl.store(lower, keys.to(tail_ptr.dtype.element_ty), mask=(k < K)[None, :])
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (v < V)[None, :]
        values = tl.load(v_ptr + ((token * heads + head) * V)[:, None] + v[None, :], mask=mask, other=0.0)
        if beta_ptr is not None:
            target = values.to(tl.float32) * -factor[:, None]
        else:
            target = tl.dot(tl.load(read_ptr + square), values, input_precision=PRECISION)
        u = tl.dot(inverse, target.to(inverse.dtype), input_precision=PRECISION)
        out = i[:, None] * V + v[None, :]
        tl.store(u_ptr + matrix * C * V + out, u.to(u_ptr.dtype.element_ty), mask=(v < V)[None, :])


@triton.jit
def _output_kernel(
    q_ptr, states_ptr, mix_ptr, written_ptr, running_ptr, read_ptr, v_ptr, out_ptr,
    first_ptr, length_ptr, heads, group, scale,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    matrix = n * heads + head
    i, v = tl.arange(0, C), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = (v < V)[None, :]
    token, inside = tl.load(first_ptr + n) + i, i < tl.load(length_ptr + n)
    out = tl.zeros((C, BLOCK_V), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = ((token * (heads // group) + head // group) * K)[:, None] + k[None, :]
        stored = tl.load(q_ptr + at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        query = stored.to(tl.float32) * scale
        if running_ptr is not None:
            if VECTOR:
                query *= tl.exp(_log_decay_of_rows(running_ptr, matrix * C * K, i, k, K, False))
            else:
                query *= tl.exp(tl.load(running_ptr + matrix * C + i))[:, None]
        at = matrix * K * V + k[:, None] * V + v[None, :]
        state = tl.load(states_ptr + at, mask=(k < K)[:, None] & in_v, other=0.0)
        out += tl.dot(query.to(stored.dtype), state, input_precision=PRECISION)
    square = matrix * C * C + i[:, None] * C + i[None, :]
    written = tl.load(written_ptr + matrix * C * V + i[:, None] * V + v[None, :], mask=in_v, other=0.0)
    out += tl.dot(tl.load(mix_ptr + square), written, input_precision=PRECISION)
    at = ((token * heads + head) * V)[:, None] + v[None, :]
    if read_ptr is not None:
        values = tl.load(v_ptr + at, mask=inside[:, None] & in_v, other=0.0)
        out += tl.dot(tl.load(read_ptr + square), values, input_precision=PRECISION)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_v)


def running_decay(log_decay: Tensor, chunks: Chunks) -> Tensor:
    """Launches the running sum: [tokens, heads] or [tokens, heads, K] to [chunks, heads, C, 1 or K], float32."""
    heads, width = log_decay.shape[1], log_decay.shape[2] if log_decay.dim() == 3 else 1
    running = log_decay.new_empty((len(chunks.first), heads, chunks.size, width), dtype=torch.float32)
    tile = RUNNING.pick(log_decay.device)
    options = tile.launch() | ({"BLOCK_K": 1} if width == 1 else {})
    grid = (len(chunks.first), heads, triton.cdiv(width, options["BLOCK_K"]))
    _running_kernel[grid](
        log_decay, running, chunks.first, chunks.length, heads, STRONGEST, C=chunks.size, KD=width, **options,
        enable_fp_fusion=True,
    )  # fmt: skip
    return running


def scores(
    q: Tensor, k: Tensor, beta: Tensor, running: Tensor | None, scale: float, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Launches the scores under one decay per head: L in float32 and A in q's dtype, both [chunks, heads, C, C]."""
    heads, size = beta.shape[1], chunks.size
    strict = q.new_empty((len(chunks.first), heads, size, size), dtype=torch.float32)
    mix = torch.empty_like(strict, dtype=q.dtype)
    tile = SCORES.pick(q.device, element_bytes=q.element_size())
    _scores_kernel[(len(chunks.first), heads)](
        q, k, beta, running, strict, mix, chunks.first, chunks.length, heads, heads // q.shape[1], scale,
        C=size, K=q.shape[2], PRECISION=precision(q.dtype), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return strict, mix


def vector_scores(
    x: Tensor, y: Tensor, weight: Tensor | None, running: Tensor, chunks: Chunks, *,
    scale: float, before: bool, strict: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Launches the scores of one kind of row against one kind of column under a vector decay.

    Args:
        x, y: [tokens, key_heads, K].
        weight: of each row, [tokens, heads], or None.
        before: rows have not seen their own token's decay yet.
        strict: leave the diagonal out.
        dtype: of the scores, [chunks, heads, C, C].
    """
    count, heads, size, key_dim = running.shape
    out = x.new_empty((count, heads, size, size), dtype=dtype)
    _vector_scores_kernel[(count, heads, size // BLOCK)](
        x, y, weight, running, out, chunks.first, chunks.length, heads, heads // x.shape[1], scale,
        C=size, K=key_dim, BEFORE=before, STRICT=strict, BLOCK=BLOCK, PRECISION=precision(x.dtype),
        **VECTOR_SCORES.pick(x.device).launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def writes(
    inverse: Tensor, rows: Tensor, tail_keys: Tensor, value_keys: Tensor | None, v: Tensor, beta: Tensor | None,
    running: Tensor | None, read: Tensor | None, chunks: Chunks,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches W [chunks, heads, C, K], U [chunks, heads, C, V] and the decayed keys [chunks, heads, C or 2C, K]."""
    count, heads, size, _ = inverse.shape
    key_dim, value_dim = rows.shape[2], v.shape[2]
    w = v.new_empty((count, heads, size, key_dim))
    u = v.new_empty((count, heads, size, value_dim))
    tail = v.new_empty((count, heads, size if value_keys is None else 2 * size, key_dim))
    _writes_kernel[(count, heads)](
        inverse, rows, tail_keys, value_keys, v, beta, running, read, w, u, tail, chunks.first, chunks.length,
        heads, heads // rows.shape[1],
        C=size, K=key_dim, V=value_dim, VECTOR=is_vector(running, key_dim), TAIL=tail.shape[2],
        PRECISION=precision(v.dtype), **WRITES.pick(v.device, element_bytes=v.element_size()).launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return w, u, tail


def output(
    q: Tensor, states: Tensor, mix: Tensor, written: Tensor, running: Tensor | None, read: Tensor | None, v: Tensor,
    scale: float, chunks: Chunks,
) -> Tensor:  # fmt: skip
    """Launches the outputs, [tokens, heads, V]; `read` (A_qk) adds its product with v."""
    out = torch.empty_like(v)
    heads, value_dim = v.shape[1:]
    tile = OUTPUT.pick(q.device, element_bytes=q.element_size())
    _output_kernel[(len(chunks.first), heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
        q, states, mix, written, running, read, v, out, chunks.first, chunks.length, heads, heads // q.shape[1], scale,
        C=chunks.size, K=q.shape[2], V=value_dim, VECTOR=is_vector(running, q.shape[2]),
        PRECISION=precision(q.dtype), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def gather(v: Tensor, chunks: Chunks) -> Tensor:
    """Tokens [tokens, heads, V] in chunks, [chunks, heads, C, V], zeros past each chunk's length."""
    place = torch.arange(chunks.size, device=v.device)
    real = place < chunks.length[:, None]
    tiles = v[(chunks.first[:, None] + place).masked_fill(~real, 0)]
    return (tiles * real[:, :, None, None].to(v.dtype)).transpose(1, 2).contiguous()


def is_vector(running: Tensor | None, key_dim: int) -> bool:
    """Whether the decay is one per key dimension; of a single dimension both kinds lie and mean the same."""
    return running is not None and running.shape[-1] == key_dim
