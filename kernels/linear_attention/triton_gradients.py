"""Decayed linear attention on the GPU, backward. Forward and names: triton_chunks.py.

With dS the gradient of the state after a chunk, and dO that of the outputs:

    dS <- e^(b_C) dS + (Q e^b)^T dO                     from the last chunk to the first
    dQ = (dO S^T) e^b + (dA . seen) K                   dA = dO V^T, faded as A is
    dK = (V dS^T) e^(b_C - b) + (dA . seen)^T Q
    dV = A^T dO + (K e^(b_C - b)) dS
    dg_t = sum over i >= t of the chunk of (q_i dq_i - k_i dk_i), plus sum_v S' dS of the state S' after the chunk

so the gradient of the decay costs no further product. Transposes of accumulators are avoided by computing both dA and
its transpose: on Hopper, Triton has mistaken such transposes.
"""

import triton
import triton.language as tl

from archcompass.kernels.linear_attention.triton_chunks import (
    _channel_decays,
    _decays,
    _fade,
    _halves,
    _place,
    _seen,
    _sequence,
    _state_tile,
    _tile,
)


@triton.jit(do_not_specialize=["time", "chunks"])
def _state_gradient_kernel(
    q_ptr, do_ptr, b_ptr, dfinal_ptr, dstates_ptr, dinitial_ptr, cu_ptr, offsets_ptr,
    time, chunks, groups, heads, scale,
    K: tl.constexpr, V: tl.constexpr, MODE: tl.constexpr, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS <- e^(b_C) dS + (Q e^b)^T dO, and dS after every chunk."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    group = head // (heads // groups)
    k = (tl.program_id(2) % tl.cdiv(K, BLOCK_K)) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = (tl.program_id(2) // tl.cdiv(K, BLOCK_K)) * BLOCK_V + tl.arange(0, BLOCK_V)
    start, length, chunk = _sequence(sequence, cu_ptr, offsets_ptr, time, chunks)
    dot = do_ptr.dtype.element_ty
    at, inside = _state_tile(dfinal_ptr, sequence.to(tl.int64), heads, head, k, v, K, V)
    dstate = tl.load(at, mask=inside, other=0.0)
    count = tl.cdiv(length, CHUNK)
    for back in range(count):
        number = count - 1 - back
        spill, held = _state_tile(dstates_ptr, chunk + number, heads, head, k, v, K, V)
        tl.store(spill, dstate.to(dstates_ptr.dtype.element_ty), mask=held)
        row, left = start + number * CHUNK + tl.arange(0, CHUNK), length - number * CHUNK
        queries = _tile(q_ptr + group * K, row, groups * K, k, left, K, CHUNK)
        douts = _tile(do_ptr + head * V, row, heads * V, v, left, V, CHUNK)
        if MODE == 1:
            read, _, total = _decays(b_ptr, row, heads, head, left, EXCLUSIVE, CHUNK)
            queries *= _fade(read)[:, None]
            dstate *= _fade(total)
        if MODE == 2:
            read, _, total = _channel_decays(b_ptr + head * K, row, heads * K, k, left, K, EXCLUSIVE, CHUNK)
            queries *= _fade(read)
            dstate *= _fade(total)[:, None]
        dstate += tl.dot(tl.trans(queries.to(dot)), douts.to(dot), input_precision=PRECISION) * scale
    at, inside = _state_tile(dinitial_ptr, sequence.to(tl.int64), heads, head, k, v, K, V)
    tl.store(at, dstate, mask=inside)


@triton.jit(do_not_specialize=["time", "chunks", "tokens"])
def _query_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, states_ptr, dstates_ptr, do_ptr, dq_ptr, dk_ptr, dg_ptr, cu_ptr, place_ptr,
    time, chunks, tokens, groups, heads, scale,
    K: tl.constexpr, V: tl.constexpr, MODE: tl.constexpr, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dg of one chunk, for some of the key channels."""
    chunk, head = tl.program_id(0), tl.program_id(2)
    group = head // (heads // groups)
    first, left = _place(chunk, cu_ptr, place_ptr, time, chunks, CHUNK)
    i = tl.arange(0, CHUNK)
    row = first + i
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dot = v_ptr.dtype.element_ty
    state_dot = states_ptr.dtype.element_ty
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    dscores_t = tl.zeros((CHUNK, CHUNK), tl.float32)
    dq = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dk = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        values = _tile(v_ptr + head * V, row, heads * V, v, left, V, CHUNK)
        douts = _tile(do_ptr + head * V, row, heads * V, v, left, V, CHUNK) * scale
        at, inside = _state_tile(states_ptr, chunk.to(tl.int64), heads, head, k, v, K, V)
        state = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at, inside = _state_tile(dstates_ptr, chunk.to(tl.int64), heads, head, k, v, K, V)
        dstate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        dscores = tl.dot(douts.to(dot), tl.trans(values.to(dot)), dscores, input_precision=PRECISION)
        dscores_t = tl.dot(values.to(dot), tl.trans(douts.to(dot)), dscores_t, input_precision=PRECISION)
        dq = tl.dot(douts.to(state_dot), tl.trans(state.to(state_dot)), dq, input_precision=PRECISION)
        dk = tl.dot(values.to(state_dot), tl.trans(dstate.to(state_dot)), dk, input_precision=PRECISION)
        kept += tl.sum(state * dstate, axis=1)
    queries = _tile(q_ptr + group * K, row, groups * K, k, left, K, CHUNK)
    keys = _tile(k_ptr + group * K, row, groups * K, k, left, K, CHUNK)
    seen = _seen(CHUNK, EXCLUSIVE)
    seen_t = tl.trans(seen)
    at_end = kept
    if MODE == 1:
        read, running, total = _decays(b_ptr, row, heads, head, left, EXCLUSIVE, CHUNK)
        dq *= _fade(read)[:, None]
        dk *= _fade(total - running)[:, None]
        at_end = kept * _fade(total) + tl.sum(keys * dk, axis=0)
        dscores *= _fade(read[:, None] - running[None, :])
        dscores_t *= _fade(read[None, :] - running[:, None])
    if MODE != 2:
        dscores, dscores_t = tl.where(seen, dscores, 0.0), tl.where(seen_t, dscores_t, 0.0)
        dq = tl.dot(dscores.to(dot), keys.to(dot), dq, input_precision=PRECISION)
        dk = tl.dot(dscores_t.to(dot), queries.to(dot), dk, input_precision=PRECISION)
    if MODE == 2:
        read, running, total = _channel_decays(b_ptr + head * K, row, heads * K, k, left, K, EXCLUSIVE, CHUNK)
        dq *= _fade(read)
        dk *= _fade(total[None, :] - running)
        at_end = kept * _fade(total) + tl.sum(keys * dk, axis=0)
        if not EXCLUSIVE:
            own = tl.sum(tl.where(i[:, None] == i[None, :], dscores, 0.0), axis=1)[:, None]
            dq += own * keys
            dk += own * queries
        for level in range(LEVELS):
            of_query, of_key, together = _halves(
                b_ptr + head * K, row, heads * K, k, left, read, running, level, K, CHUNK
            )
            here = tl.where(together, dscores, 0.0).to(dot)
            here_t = tl.where(together, dscores_t, 0.0).to(dot)
            dq += of_query * tl.dot(here, (keys * of_key).to(dot), input_precision=PRECISION)
            dk += of_key * tl.dot(here_t, (queries * of_query).to(dot), input_precision=PRECISION)
    inside = (i < left)[:, None] & (k < K)[None, :]
    at = (row[:, None] * heads + head) * K + k[None, :]
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if MODE == 1:
        by_query, by_key = tl.sum(queries * dq, axis=1), tl.sum(keys * dk, axis=1)
        # As one row of a matrix: Triton 3.6 fails on sm_100 where a product's sum is a vector that is summed once more.
        dg = tl.cumsum(by_query - by_key, axis=0, reverse=True) + tl.sum(at_end[None, :], axis=1)
        if EXCLUSIVE:
            dg -= by_query
        partial = tl.program_id(1).to(tl.int64) * tokens
        tl.store(dg_ptr + (partial + row) * heads + head, dg, mask=i < left)
    if MODE == 2:
        by_query = queries * dq
        dg = tl.cumsum(by_query - keys * dk, axis=0, reverse=True) + at_end[None, :]
        if EXCLUSIVE:
            dg -= by_query
        tl.store(dg_ptr + at, dg, mask=inside)


@triton.jit(do_not_specialize=["time", "chunks"])
def _value_gradient_kernel(
    q_ptr, k_ptr, b_ptr, scores_ptr, dstates_ptr, do_ptr, dv_ptr, cu_ptr, place_ptr,
    time, chunks, groups, heads, scale,
    K: tl.constexpr, V: tl.constexpr, MODE: tl.constexpr, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = A^T dO + (K e^(b_C - b)) dS."""
    chunk, head = tl.program_id(0), tl.program_id(2)
    group = head // (heads // groups)
    first, left = _place(chunk, cu_ptr, place_ptr, time, chunks, CHUNK)
    i = tl.arange(0, CHUNK)
    row = first + i
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    dot = do_ptr.dtype.element_ty
    state_dot = dstates_ptr.dtype.element_ty
    dv = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    scores_t = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        keys = _tile(k_ptr + group * K, row, groups * K, k, left, K, CHUNK)
        if MODE != 2:
            queries = _tile(q_ptr + group * K, row, groups * K, k, left, K, CHUNK)
            scores_t = tl.dot(keys.to(dot), tl.trans(queries.to(dot)), scores_t, input_precision=PRECISION)
        else:
            _, running, total = _channel_decays(b_ptr + head * K, row, heads * K, k, left, K, False, CHUNK)
            keys *= _fade(total[None, :] - running)
        at, inside = _state_tile(dstates_ptr, chunk.to(tl.int64), heads, head, k, v, K, V)
        dstate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        dv = tl.dot(keys.to(state_dot), dstate.to(state_dot), dv, input_precision=PRECISION)
    if MODE == 1:
        read, running, total = _decays(b_ptr, row, heads, head, left, EXCLUSIVE, CHUNK)
        dv *= _fade(total - running)[:, None]
        scores_t *= _fade(read[None, :] - running[:, None])
    if MODE == 2:
        at = (row[None, :] * heads + head) * CHUNK + i[:, None]
        scores_t = tl.load(scores_ptr + at, mask=(i < left)[None, :], other=0.0).to(tl.float32)
    scores_t = tl.where(tl.trans(_seen(CHUNK, EXCLUSIVE)), scores_t, 0.0)
    douts = _tile(do_ptr + head * V, row, heads * V, v, left, V, CHUNK) * scale
    dv = tl.dot(scores_t.to(dot), douts.to(dot), dv, input_precision=PRECISION)
    at = (row[:, None] * heads + head) * V + v[None, :]
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=(i < left)[:, None] & (v < V)[None, :])
