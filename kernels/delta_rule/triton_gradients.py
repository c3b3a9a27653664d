"""The delta rule and DPLR on the GPU, backward. Forward and names: triton_prepare.py, around the passes of triton_passes.py.

Every form is written with rows a: those of DPLR, or a = -beta k with b = k for the delta rule. A chunk then solves

    (I - A_ab) Z = Y + R S        R = a exp(c), Y = beta V or A_ak V        O = Q' S + A_qb Z (+ A_qk V)

and differentiating that equation, instead of its solution, needs neither W nor U nor the gradient of an inverse:

    output   dZ = A_qbᵀ dO and dS = Q'ᵀ dO, which enter the reverse state pass
    target   dY = (I - A_ab)⁻ᵀ dZ,  dV = beta dY, or A_akᵀ dY + A_qkᵀ dO and what the state says
    pairs    dA_ab = dY Zᵀ,  dA_qb = dO Zᵀ,  dA_ak = dY Vᵀ,  dA_qk = dO Vᵀ,  all below the diagonal
    rows     through the state dR = dY Sᵀ, dQ' = dO Sᵀ, dB' = Z dS'ᵀ, dK' = V dS'ᵀ; through the scores dA times columns
             and dAᵀ times rows; and of the decay, with no further product,
             dg_t = sum over i >= t of the chunk of (q_i dq_i + a_i da_i - b_i db_i - k_i dk_i), plus that of its whole

A decay per head is multiplied into dA once, by `pairs`. Under a decay per key dimension the scores are taken apart by
halving, as in `decay.vector_decayed_scores`: no exponent is positive.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.delta_rule.tiles import OUTPUT_GRADIENT, PAIRS_GRADIENT, ROWS_GRADIENT, TARGET_GRADIENT
from archcompass.kernels.delta_rule.triton_passes import precision
from archcompass.kernels.delta_rule.triton_prepare import STRONGEST, Chunks, _log_decay_of_rows, is_vector


class Scores(NamedTuple):
    """What the forward pass leaves for the backward pass, all [chunks, heads, C, C] in the inputs' dtype.

    inverse: of I - A_ab.
    q_b: scores of queries against what is written.
    a_k, q_k: scores against the values' own keys; of DPLR only.
    """

    inverse: Tensor
    q_b: Tensor
    a_k: Tensor | None = None
    q_k: Tensor | None = None


@triton.jit
def _key_rows(ptr, token, inside, heads, group, head, k, K: tl.constexpr):
    """[C, k] of a tensor [tokens, key heads, K], with zeros outside."""
    at = ((token * (heads // group) + head // group) * K)[:, None] + k[None, :]
    return tl.load(ptr + at, mask=inside[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _value_rows(ptr, row, stride, inside, v, V: tl.constexpr):
    """[C, v] of rows of V numbers, `stride` apart, with zeros outside."""
    return tl.load(ptr + (row * stride)[:, None] + v[None, :], mask=inside[:, None] & (v < V)[None, :], other=0.0)


@triton.jit
def _output_gradient_kernel(
    q_ptr, mix_ptr, running_ptr, dout_ptr, dwritten_ptr, dstates_ptr, first_ptr, length_ptr, heads, group, scale,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ and dS of one chunk and head, as far as the outputs of the chunk make them."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    matrix = n * heads + head
    i, v = tl.arange(0, C), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    token, inside = tl.load(first_ptr + n) + i, i < tl.load(length_ptr + n)
    dout = _value_rows(dout_ptr + head * V, token, heads * V, inside, v, V)
    mix = tl.load(mix_ptr + matrix * C * C + i[:, None] * C + i[None, :])
    dwritten = tl.dot(tl.trans(mix), dout, input_precision=PRECISION)
    at = matrix * C * V + i[:, None] * V + v[None, :]
    tl.store(dwritten_ptr + at, dwritten.to(dwritten_ptr.dtype.element_ty), mask=(v < V)[None, :])
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        query = _key_rows(q_ptr, token, inside, heads, group, head, k, K).to(tl.float32) * scale
        if running_ptr is not None:
            if VECTOR:
                query *= tl.exp(_log_decay_of_rows(running_ptr, matrix * C * K, i, k, K, False))
            else:
                query *= tl.exp(tl.load(running_ptr + matrix * C + i))[:, None]
        dstate = tl.dot(tl.trans(query.to(dout.dtype)), dout, input_precision=PRECISION)
        place = matrix * K * V + k[:, None] * V + v[None, :]
        tl.store(dstates_ptr + place, dstate.to(dstates_ptr.dtype.element_ty), mask=(k < K)[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _target_gradient_kernel(
    inverse_ptr, dwritten_ptr, dout_ptr, v_ptr, beta_ptr, a_k_ptr, q_k_ptr, dvalues_ptr,
    dtarget_ptr, dv_ptr, dbeta_ptr, first_ptr, length_ptr, tokens, heads,
    C: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY and dV of one chunk and head; beta_ptr is given for the delta rule, else a_k_ptr, q_k_ptr and dvalues_ptr."""
    n, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    matrix = n * heads + head
    i, v = tl.arange(0, C), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    token, inside = tl.load(first_ptr + n) + i, i < tl.load(length_ptr + n)
    square = matrix * C * C + i[:, None] * C + i[None, :]
    place, in_v = matrix * C * V + i[:, None] * V + v[None, :], (v < V)[None, :]
    dwritten = tl.load(dwritten_ptr + place, mask=in_v, other=0.0)
    dtarget = tl.dot(tl.trans(tl.load(inverse_ptr + square)), dwritten, input_precision=PRECISION)
    rounded = dtarget.to(dwritten.dtype)
    tl.store(dtarget_ptr + place, rounded, mask=in_v)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + token * heads + head, mask=inside, other=0.0).to(tl.float32)
        values = _value_rows(v_ptr + head * V, token, heads * V, inside, v, V).to(tl.float32)
        dbeta = tl.sum(dtarget * values, axis=1)
        tl.store(dbeta_ptr + (tile * tokens + token) * heads + head, dbeta, mask=inside)
        dv = beta[:, None] * dtarget
    else:
        dout = _value_rows(dout_ptr + head * V, token, heads * V, inside, v, V)
        dv = tl.load(dvalues_ptr + place, mask=in_v, other=0.0).to(tl.float32)
        dv = tl.dot(tl.trans(tl.load(a_k_ptr + square)), rounded, dv, input_precision=PRECISION)
        dv = tl.dot(tl.trans(tl.load(q_k_ptr + square)), dout, dv, input_precision=PRECISION)
    at = ((token * heads + head) * V)[:, None] + v[None, :]
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & in_v)


@triton.jit
def _pairs_gradient_kernel(
    dtarget_ptr, dout_ptr, written_ptr, v_ptr, running_ptr, dscores_ptr, first_ptr, length_ptr, heads, scale,
    C: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores of rows a (strict) and q against what is written or, given v_ptr, against the values."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    matrix, count = n * heads + head, tl.num_programs(0).to(tl.int64) * heads
    i = tl.arange(0, C)
    token, inside = tl.load(first_ptr + n) + i, i < tl.load(length_ptr + n)
    of_a, of_q = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        place = matrix * C * V + i[:, None] * V + v[None, :]
        dtarget = tl.load(dtarget_ptr + place, mask=(v < V)[None, :], other=0.0)
        dout = _value_rows(dout_ptr + head * V, token, heads * V, inside, v, V)
        if v_ptr is None:
            column = tl.load(written_ptr + place, mask=(v < V)[None, :], other=0.0)
        else:
            column = _value_rows(v_ptr + head * V, token, heads * V, inside, v, V)
        of_a = tl.dot(dtarget, tl.trans(column), of_a, input_precision=PRECISION)
        of_q = tl.dot(dout, tl.trans(column), of_q, input_precision=PRECISION)
    if running_ptr is not None:
        running = tl.load(running_ptr + matrix * C + i)
        faded = tl.exp(tl.minimum(running[:, None] - running[None, :], 0.0))
        of_a *= faded
        of_q *= faded
    at = dscores_ptr + matrix * C * C + i[:, None] * C + i[None, :]
    of_a = tl.where(i[:, None] > i[None, :], of_a, 0.0)
    of_q = tl.where(i[:, None] >= i[None, :], of_q * scale, 0.0)
    tl.store(at, of_a.to(dscores_ptr.dtype.element_ty))
    tl.store(at + count * C * C, of_q.to(dscores_ptr.dtype.element_ty))


@triton.jit
def _halving(running_ptr, base, i, k, read_a, running, level, K: tl.constexpr, C: tl.constexpr):
    """One level of the halving: factors of rows a and rows q in right halves and of columns in left halves of blocks of
    2^(level + 1), and which pairs the level serves. The anchor is the last token of the left half."""
    size = 1 << level
    block = i // (2 * size)
    right = ((i // size) % 2 == 1)[:, None]
    anchor = _log_decay_of_rows(running_ptr, base, block * (2 * size) + size - 1, k, K, False)
    of_a = tl.where(right, tl.exp(tl.minimum(read_a - anchor, 0.0)), 0.0)
    of_q = tl.where(right, tl.exp(tl.minimum(running - anchor, 0.0)), 0.0)
    of_column = tl.where(right, 0.0, tl.exp(tl.minimum(anchor - running, 0.0)))
    return of_a, of_q, of_column, block[:, None] == block[None, :]


@triton.jit(do_not_specialize=["tokens"])
def _rows_gradient_kernel(
    q_ptr, a_ptr, b_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, running_ptr,
    states_ptr, after_ptr, dtarget_ptr, written_ptr, dout_ptr, dscores_ptr,
    dq_ptr, da_ptr, db_ptr, dk_ptr, dbeta_ptr, dg_ptr, first_ptr, length_ptr, tokens, heads, group, scale, strongest,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of every row of one chunk and head, for some of the key dimensions; k_ptr is given for DPLR only."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    matrix, count = n * heads + head, tl.num_programs(0).to(tl.int64) * heads
    i, k = tl.arange(0, C), tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    token, inside = tl.load(first_ptr + n) + i, i < tl.load(length_ptr + n)
    dot = dout_ptr.dtype.element_ty
    dq, da = tl.zeros((C, BLOCK_K), tl.float32), tl.zeros((C, BLOCK_K), tl.float32)
    db, dk = tl.zeros((C, BLOCK_K), tl.float32), tl.zeros((C, BLOCK_K), tl.float32)
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        at, in_kv = matrix * K * V + k[:, None] * V + v[None, :], (k < K)[:, None] & (v < V)[None, :]
        state = tl.load(states_ptr + at, mask=in_kv, other=0.0)
        after = tl.load(after_ptr + at, mask=in_kv, other=0.0)
        at = matrix * C * V + i[:, None] * V + v[None, :]
        dtarget = tl.load(dtarget_ptr + at, mask=(v < V)[None, :], other=0.0)
        written = tl.load(written_ptr + at, mask=(v < V)[None, :], other=0.0)
        dout = _value_rows(dout_ptr + head * V, token, heads * V, inside, v, V)
        da = tl.dot(dtarget, tl.trans(state), da, input_precision=PRECISION)
        dq = tl.dot(dout, tl.trans(state), dq, input_precision=PRECISION)
        db = tl.dot(written, tl.trans(after), db, input_precision=PRECISION)
        if k_ptr is not None:
            values = _value_rows(v_ptr + head * V, token, heads * V, inside, v, V)
            dk = tl.dot(values, tl.trans(after), dk, input_precision=PRECISION)
        if running_ptr is not None:
            kept += tl.sum(state.to(tl.float32) * after.to(tl.float32), axis=1)
    dq *= scale
    query = _key_rows(q_ptr, token, inside, heads, group, head, k, K).to(tl.float32)
    column = _key_rows(b_ptr, token, inside, heads, group, head, k, K).to(tl.float32)
    if k_ptr is not None:
        row = _key_rows(a_ptr, token, inside, heads, group, head, k, K).to(tl.float32)
        key = _key_rows(k_ptr, token, inside, heads, group, head, k, K).to(tl.float32)
    else:
        beta = tl.load(beta_ptr + token * heads + head, mask=inside, other=0.0).to(tl.float32)[:, None]
        row = -beta * column
    if running_ptr is not None:
        if VECTOR:
            running = _log_decay_of_rows(running_ptr, matrix * C * K, i, k, K, False)
            read_a = running if k_ptr is None else _log_decay_of_rows(running_ptr, matrix * C * K, i, k, K, True)
            whole = tl.load(running_ptr + matrix * C * K + (C - 1) * K + k, mask=k < K, other=0.0)
            until_end = tl.exp(whole[None, :] - running)
            da *= tl.exp(read_a)
            dq *= tl.exp(running)
            dk *= until_end
        else:
            running = tl.load(running_ptr + matrix * C + i)
            whole = tl.load(running_ptr + matrix * C + C - 1)
            until_end = tl.exp(whole - running)[:, None]
            da *= tl.exp(running)[:, None]
            dq *= tl.exp(running)[:, None]
        db *= until_end
        at_end = kept * tl.exp(whole) + tl.sum(column * db, axis=0)
        if k_ptr is not None:
            at_end += tl.sum(key * dk, axis=0)
    pairs = dscores_ptr + matrix * C * C + i[:, None] * C + i[None, :]
    if VECTOR:
        diagonal = dscores_ptr + (count + matrix) * C * C + i * (C + 1)
        own = tl.load(diagonal).to(tl.float32)[:, None]
        dq += own * column
        db += own * query
        if k_ptr is not None:
            own = tl.load(diagonal + 2 * count * C * C).to(tl.float32)[:, None]
            dq += own * key
            dk += own * query
        for level in range(LEVELS):
            of_a, of_q, of_column, together = _halving(running_ptr, matrix * C * K, i, k, read_a, running, level, K, C)
            rows, queries = (row * of_a).to(dot), (query * of_q).to(dot)
            columns = (column * of_column).to(dot)
            from_a = tl.load(pairs, mask=together, other=0.0)
            from_q = tl.load(pairs + count * C * C, mask=together, other=0.0)
            to_a = tl.dot(from_a, columns, input_precision=PRECISION)
            to_q = tl.dot(from_q, columns, input_precision=PRECISION)
            to_column = tl.dot(tl.trans(from_a), rows, input_precision=PRECISION)
            db += of_column * tl.dot(tl.trans(from_q), queries, to_column, input_precision=PRECISION)
            if k_ptr is not None:
                columns = (key * of_column).to(dot)
                from_a = tl.load(pairs + 2 * count * C * C, mask=together, other=0.0)
                from_q = tl.load(pairs + 3 * count * C * C, mask=together, other=0.0)
                to_a = tl.dot(from_a, columns, to_a, input_precision=PRECISION)
                to_q = tl.dot(from_q, columns, to_q, input_precision=PRECISION)
                to_column = tl.dot(tl.trans(from_a), rows, input_precision=PRECISION)
                dk += of_column * tl.dot(tl.trans(from_q), queries, to_column, input_precision=PRECISION)
            da += of_a * to_a
            dq += of_q * to_q
    else:
        from_a, from_q = tl.load(pairs), tl.load(pairs + count * C * C)
        da = tl.dot(from_a, column.to(dot), da, input_precision=PRECISION)
        dq = tl.dot(from_q, column.to(dot), dq, input_precision=PRECISION)
        db = tl.dot(tl.trans(from_a), row.to(dot), db, input_precision=PRECISION)
        db = tl.dot(tl.trans(from_q), query.to(dot), db, input_precision=PRECISION)
    out, mask = ((token * heads + head) * K)[:, None] + k[None, :], inside[:, None] & (k < K)[None, :]
    partial = tl.program_id(2).to(tl.int64)
    tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    if k_ptr is not None:
        tl.store(da_ptr + out, da.to(da_ptr.dtype.element_ty), mask=mask)
        tl.store(db_ptr + out, db.to(db_ptr.dtype.element_ty), mask=mask)
        tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(db_ptr + out, (db - beta * da).to(db_ptr.dtype.element_ty), mask=mask)
        dbeta = -tl.sum(column * da, axis=1)
        tl.store(dbeta_ptr + (partial * tokens + token) * heads + head, dbeta, mask=inside)
    if running_ptr is not None:
        fading = query * dq + row * da - column * db
        if VECTOR:
            g = tl.load(g_ptr + out, mask=mask, other=0.0).to(tl.float32)
            if k_ptr is not None:
                fading -= key * dk
            dg = tl.cumsum(fading, axis=0, reverse=True) + at_end[None, :]
            if k_ptr is not None:
                dg -= row * da
            tl.store(dg_ptr + out, tl.where(g >= strongest, dg, 0.0), mask=mask)
        else:
            g = tl.load(g_ptr + token * heads + head, mask=inside, other=0.0).to(tl.float32)
            # As one row of a matrix: Triton 3.6 fails on sm_100 where a product's sum is a vector that is summed once more.
            dg = tl.cumsum(tl.sum(fading, axis=1), axis=0, reverse=True) + tl.sum(at_end[None, :], axis=1)
            dg = tl.where(g >= strongest, dg, 0.0)
            tl.store(dg_ptr + (partial * tokens + token) * heads + head, dg, mask=inside)


def of_output(
    dout: Tensor, q: Tensor, mix: Tensor, running: Tensor | None, scale: float, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Launches what the outputs say of Z, [chunks, heads, C, V], and of the states, [chunks, heads, K, V]."""
    count, heads, size, _ = mix.shape
    key_dim, value_dim = q.shape[2], dout.shape[2]
    dwritten = dout.new_empty((count, heads, size, value_dim))
    dstates = dout.new_empty((count, heads, key_dim, value_dim))
    tile = OUTPUT_GRADIENT.pick(q.device, element_bytes=q.element_size())
    _output_gradient_kernel[(count, heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
        q, mix, running, dout, dwritten, dstates, chunks.first, chunks.length, heads, heads // q.shape[1], scale,
        C=size, K=key_dim, V=value_dim, VECTOR=is_vector(running, key_dim), PRECISION=precision(q.dtype),
        **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return dwritten, dstates


def of_target(
    scores: Scores,
    dwritten: Tensor,
    dvalues: Tensor | None,
    dout: Tensor,
    v: Tensor,
    beta: Tensor | None,
    chunks: Chunks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches dY [chunks, heads, C, V], dV like v, and what beta [tokens, heads] feels of the values (zeros without)."""
    count, heads, size, _ = scores.inverse.shape
    tokens, _, value_dim = v.shape
    dtarget, dv = torch.empty_like(dwritten), torch.empty_like(v)
    tile = TARGET_GRADIENT.pick(v.device, element_bytes=v.element_size())
    tiles = triton.cdiv(value_dim, tile.blocks["BLOCK_V"])
    dbeta = v.new_empty((0 if beta is None else tiles, tokens, heads), dtype=torch.float32)
    _target_gradient_kernel[(count, heads, tiles)](
        scores.inverse, dwritten, dout, v, beta, scores.a_k, scores.q_k, dvalues, dtarget, dv, dbeta,
        chunks.first, chunks.length, tokens, heads,
        C=size, V=value_dim, PRECISION=precision(v.dtype), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return dtarget, dv, dbeta.sum(0)


def of_pairs(
    dtarget: Tensor,
    dout: Tensor,
    written: Tensor,
    v: Tensor | None,
    running: Tensor | None,
    scale: float,
    chunks: Chunks,
) -> Tensor:
    """Launches the gradients of the scores, [2, or 4 given the values, chunks, heads, C, C].

    A decay per head comes as `running`; one per key dimension does not."""
    count, heads, size, value_dim = dtarget.shape
    dscores = dout.new_empty((2 if v is None else 4, count, heads, size, size))
    tile = PAIRS_GRADIENT.pick(dout.device, element_bytes=dout.element_size())
    for columns, target in zip((None,) if v is None else (None, v), dscores.split(2), strict=True):
        _pairs_gradient_kernel[(count, heads)](
            dtarget, dout, written, columns, running, target, chunks.first, chunks.length, heads, scale,
            C=size, V=value_dim, PRECISION=precision(dout.dtype), **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return dscores


class Rows(NamedTuple):
    """Gradients of rows like q, and in float32 of beta and of the decay; without meaning where these are not."""

    q: Tensor
    a: Tensor
    b: Tensor
    k: Tensor
    beta: Tensor
    decay: Tensor


def of_rows(
    q: Tensor, a: Tensor | None, b: Tensor, k: Tensor | None, v: Tensor, beta: Tensor | None, log_decay: Tensor | None,
    running: Tensor | None, states: Tensor, after: Tensor, dtarget: Tensor, written: Tensor, dout: Tensor,
    dscores: Tensor, scale: float, chunks: Chunks,
) -> Rows:  # fmt: skip
    """Launches the gradients of every row; a and k are those of DPLR, without which b are keys and `beta` counts."""
    (tokens, heads, value_dim), (_, key_heads, key_dim) = v.shape, q.shape
    vector = log_decay is not None and log_decay.dim() == 3
    kinds = dscores.shape[0]
    tile = ROWS_GRADIENT.pick(q.device, element_bytes=q.element_size(), kinds=kinds, vector=int(vector))
    tiles = triton.cdiv(key_dim, tile.blocks["BLOCK_K"])
    # Heads that share a key head are summed below.
    dtype = q.dtype if heads == key_heads else torch.float32
    dq, db = (q.new_empty((tokens, heads, key_dim), dtype=dtype) for _ in range(2))
    da, dk = (q.new_empty(0) if k is None else torch.empty_like(dq) for _ in range(2))
    partial = q.new_empty((2, tiles, tokens, heads), dtype=torch.float32)
    dg = q.new_empty((tokens, heads, key_dim), dtype=torch.float32) if vector else partial[1]
    _rows_gradient_kernel[(len(chunks.first), heads, tiles)](
        q, a, b, k, v, beta, log_decay, running, states, after, dtarget, written, dout, dscores,
        dq, da, db, dk, partial, dg, chunks.first, chunks.length, tokens, heads, heads // key_heads, scale, STRONGEST,
        C=chunks.size, K=key_dim, V=value_dim, VECTOR=vector, LEVELS=chunks.size.bit_length() - 1,
        PRECISION=precision(q.dtype), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    if heads != key_heads:
        dq, db = (x.unflatten(1, (key_heads, -1)).sum(2).to(q.dtype) for x in (dq, db))
    return Rows(dq, da, db, dk, partial[0].sum(0), dg if vector else dg.sum(0))
