"""Decayed linear attention on the GPU, forward: running decay, state pass, scores (vector decay), output.

The algebra is that of chunked.py. Tokens of all sequences lie in rows [tokens, heads, dim]; a chunk is found by its
sequence and its place in it, so equally long and packed sequences run the same code. Decays are kept as base-2
logarithms, the running sum is float32, and no exponent is ever positive.

Names: MODE is 0 without decay, 1 with one per head, 2 with one per channel; CHUNK tokens make a chunk (C), `b` is the
running log decay, `read` what a query sees of it (b, or b of the token before where the token does not see itself).
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
STRONGEST: tl.constexpr = tl.constexpr(-110.0)  # natural logarithm: in float32 that is to forget everything


@triton.jit
def _sequence(index, cu_ptr, offsets_ptr, time, chunks):
    """First row, length and first chunk of a sequence."""
    if cu_ptr is None:
        start = index.to(tl.int64) * time
        length = time
        first_chunk = index.to(tl.int64) * chunks
    else:
        start = tl.load(cu_ptr + index).to(tl.int64)
        length = (tl.load(cu_ptr + index + 1) - start).to(tl.int32)
        first_chunk = tl.load(offsets_ptr + index).to(tl.int64)
    return start, length, first_chunk


@triton.jit
def _place(chunk, cu_ptr, place_ptr, time, chunks, CHUNK: tl.constexpr):
    """First row of a chunk and how many rows are left in its sequence; none are left in a chunk that is not used."""
    if cu_ptr is None:
        sequence = chunk // chunks
        number = chunk % chunks
        start = sequence.to(tl.int64) * time
        length = time
    else:
        sequence = tl.load(place_ptr + 2 * chunk)
        number = tl.load(place_ptr + 2 * chunk + 1)
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_ptr + sequence + 1) - start).to(tl.int32)
    return start + number * CHUNK, length - number * CHUNK


@triton.jit
def _tile(ptr, row, stride, column, left, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """[CHUNK, columns] of a tensor of rows, in float32, with zeros outside."""
    inside = (tl.arange(0, CHUNK) < left)[:, None] & (column < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _state_tile(ptr, chunk, heads, head, k, v, K: tl.constexpr, V: tl.constexpr):
    """Addresses and mask of [k, v] of one state."""
    at = (chunk * heads + head) * K * V + k[:, None] * V + v[None, :]
    return ptr + at, (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def _decays(b_ptr, row, heads, head, left, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr):
    """With a decay per head: what queries read, what is running, and its total, over one chunk."""
    i = tl.arange(0, CHUNK)
    running = tl.load(b_ptr + row * heads + head, mask=i < left, other=0.0)
    read = running
    if EXCLUSIVE:
        read = tl.load(b_ptr + (row - 1) * heads + head, mask=(i > 0) & (i < left), other=0.0)
    last = tl.minimum(left, CHUNK) - 1
    total = tl.sum(tl.where(i == last, running, 0.0), axis=0)
    return read, running, total


@triton.jit
def _channel_decays(b_ptr, row, stride, k, left, K: tl.constexpr, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr):
    """With a decay per channel: the same, [CHUNK, k], [CHUNK, k] and [k]."""
    i = tl.arange(0, CHUNK)
    running = _tile(b_ptr, row, stride, k, left, K, CHUNK)
    read = running
    if EXCLUSIVE:
        seen = ((i > 0) & (i < left))[:, None] & (k < K)[None, :]
        read = tl.load(b_ptr + (row - 1)[:, None] * stride + k[None, :], mask=seen, other=0.0)
    last = tl.minimum(left, CHUNK) - 1
    total = tl.sum(tl.where((i == last)[:, None], running, 0.0), axis=0)
    return read, running, total


@triton.jit
def _fade(exponent):
    """2^exponent, and 1 where rounding made the exponent positive."""
    return tl.exp2(tl.minimum(exponent, 0.0))


@triton.jit
def _seen(CHUNK: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Which tokens (columns) a query (row) sees."""
    i = tl.arange(0, CHUNK)
    return i[:, None] > i[None, :] if EXCLUSIVE else i[:, None] >= i[None, :]


@triton.jit
def _halves(b_ptr, row, stride, k, left, read, running, level, K: tl.constexpr, CHUNK: tl.constexpr):
    """One level of the halving: factors of queries in right halves and of keys in left halves of blocks of 2^(level + 1).

    The anchor is the running decay of the last token of the left half. Also which pairs of tokens the level serves.
    """
    size = 1 << level
    i = tl.arange(0, CHUNK)
    block = i // (2 * size)
    right = (i // size) % 2 == 1
    anchor_row = block * (2 * size) + size - 1
    inside = (anchor_row < left)[:, None] & (k < K)[None, :]
    anchor = tl.load(b_ptr + (row - i + anchor_row)[:, None] * stride + k[None, :], mask=inside, other=0.0)
    of_query = tl.where(right[:, None], _fade(read - anchor), 0.0)
    of_key = tl.where(right[:, None], 0.0, _fade(anchor - running))
    return of_query, of_key, block[:, None] == block[None, :]


@triton.jit(do_not_specialize=["time", "chunks"])
def _running_decay_kernel(
    g_ptr, b_ptr, cu_ptr, place_ptr, time, chunks, columns, g_stride,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, left = _place(tl.program_id(0), cu_ptr, place_ptr, time, chunks, CHUNK)
    i = tl.arange(0, CHUNK)
    row = first + i
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < left)[:, None] & (column < columns)[None, :]
    g = tl.load(g_ptr + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.cumsum(tl.maximum(g, STRONGEST) * LOG2_E, axis=0)
    tl.store(b_ptr + row[:, None] * columns + column[None, :], b, mask=inside)


@triton.jit(do_not_specialize=["time", "chunks"])
def _state_kernel(
    k_ptr, v_ptr, b_ptr, initial_ptr, states_ptr, final_ptr, cu_ptr, offsets_ptr,
    time, chunks, groups, heads,
    K: tl.constexpr, V: tl.constexpr, MODE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S <- e^(b_C) S + (K e^(b_C - b))^T V, and S before every chunk."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    group = head // (heads // groups)
    k = (tl.program_id(2) % tl.cdiv(K, BLOCK_K)) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = (tl.program_id(2) // tl.cdiv(K, BLOCK_K)) * BLOCK_V + tl.arange(0, BLOCK_V)
    start, length, chunk = _sequence(sequence, cu_ptr, offsets_ptr, time, chunks)
    dot = v_ptr.dtype.element_ty
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if initial_ptr is not None:
        at, inside = _state_tile(initial_ptr, sequence.to(tl.int64), heads, head, k, v, K, V)
        state = tl.load(at, mask=inside, other=0.0)
    for done in range(0, length, CHUNK):
        spill, held = _state_tile(states_ptr, chunk, heads, head, k, v, K, V)
        tl.store(spill, state.to(states_ptr.dtype.element_ty), mask=held)
        row, left = start + done + tl.arange(0, CHUNK), length - done
        keys = _tile(k_ptr + group * K, row, groups * K, k, left, K, CHUNK)
        values = _tile(v_ptr + head * V, row, heads * V, v, left, V, CHUNK)
        if MODE == 1:
            _, running, total = _decays(b_ptr, row, heads, head, left, False, CHUNK)
            keys *= _fade(total - running)[:, None]
            state *= _fade(total)
        if MODE == 2:
            _, running, total = _channel_decays(b_ptr + head * K, row, heads * K, k, left, K, False, CHUNK)
            keys *= _fade(total[None, :] - running)
            state *= _fade(total)[:, None]
        state = tl.dot(tl.trans(keys.to(dot)), values.to(dot), state, input_precision=PRECISION)
        chunk += 1
    at, inside = _state_tile(final_ptr, sequence.to(tl.int64), heads, head, k, v, K, V)
    tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=["time", "chunks"])
def _scores_kernel(
    q_ptr, k_ptr, b_ptr, scores_ptr, cu_ptr, place_ptr,
    time, chunks, groups, heads,
    K: tl.constexpr, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With a decay per channel, A_ij = sum_d q_id k_jd e^(b_id - b_jd) by halving, as `chunked._anchored_scores`."""
    head = tl.program_id(1)
    group = head // (heads // groups)
    first, left = _place(tl.program_id(0), cu_ptr, place_ptr, time, chunks, CHUNK)
    i = tl.arange(0, CHUNK)
    row = first + i
    dot = q_ptr.dtype.element_ty
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    own = tl.zeros((CHUNK,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        queries = _tile(q_ptr + group * K, row, groups * K, k, left, K, CHUNK)
        keys = _tile(k_ptr + group * K, row, groups * K, k, left, K, CHUNK)
        read, running, _ = _channel_decays(b_ptr + head * K, row, heads * K, k, left, K, EXCLUSIVE, CHUNK)
        own += tl.sum(queries * keys, axis=1)
        for level in range(LEVELS):
            of_query, of_key, together = _halves(
                b_ptr + head * K, row, heads * K, k, left, read, running, level, K, CHUNK
            )
            product = tl.dot((queries * of_query).to(dot), tl.trans((keys * of_key).to(dot)), input_precision=PRECISION)
            scores += tl.where(together, product, 0.0)
    if not EXCLUSIVE:
        scores += tl.where(i[:, None] == i[None, :], own[:, None], 0.0)
    at = (row[:, None] * heads + head) * CHUNK + i[None, :]
    tl.store(scores_ptr + at, scores.to(scores_ptr.dtype.element_ty), mask=(i < left)[:, None])


@triton.jit(do_not_specialize=["time", "chunks"])
def _output_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, scores_ptr, states_ptr, out_ptr, cu_ptr, place_ptr,
    time, chunks, groups, heads, scale,
    K: tl.constexpr, V: tl.constexpr, MODE: tl.constexpr, EXCLUSIVE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = (Q e^b) S + (A . seen) V."""
    chunk, head = tl.program_id(0), tl.program_id(2)
    group = head // (heads // groups)
    first, left = _place(chunk, cu_ptr, place_ptr, time, chunks, CHUNK)
    i = tl.arange(0, CHUNK)
    row = first + i
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    dot = v_ptr.dtype.element_ty
    state_dot = states_ptr.dtype.element_ty
    out = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        queries = _tile(q_ptr + group * K, row, groups * K, k, left, K, CHUNK)
        if MODE != 2:
            keys = _tile(k_ptr + group * K, row, groups * K, k, left, K, CHUNK)
            scores = tl.dot(queries.to(dot), tl.trans(keys.to(dot)), scores, input_precision=PRECISION)
        else:
            read, _, _ = _channel_decays(b_ptr + head * K, row, heads * K, k, left, K, EXCLUSIVE, CHUNK)
            queries *= _fade(read)
        at, inside = _state_tile(states_ptr, chunk.to(tl.int64), heads, head, k, v, K, V)
        state = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        out = tl.dot(queries.to(state_dot), state.to(state_dot), out, input_precision=PRECISION)
    if MODE == 1:
        read, running, _ = _decays(b_ptr, row, heads, head, left, EXCLUSIVE, CHUNK)
        out *= _fade(read)[:, None]
        scores *= _fade(read[:, None] - running[None, :])
    if MODE == 2:
        at = (row[:, None] * heads + head) * CHUNK + i[None, :]
        scores = tl.load(scores_ptr + at, mask=(i < left)[:, None], other=0.0).to(tl.float32)
    scores = tl.where(_seen(CHUNK, EXCLUSIVE), scores, 0.0)
    values = _tile(v_ptr + head * V, row, heads * V, v, left, V, CHUNK)
    out = tl.dot(scores.to(dot), values.to(dot), out, input_precision=PRECISION) * scale
    at = (row[:, None] * heads + head) * V + v[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(i < left)[:, None] & (v < V)[None, :])


@triton.jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, bonus_ptr, state_ptr, out_ptr,
    groups, heads, g_stride, scale,
    K: tl.constexpr, V: tl.constexpr, MODE: tl.constexpr, EXCLUSIVE: tl.constexpr, ALL_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token of the recurrence; the state is overwritten."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (heads // groups)
    k, v = tl.arange(0, ALL_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    query = tl.load(q_ptr + (sequence * groups + group) * K + k, mask=k < K, other=0.0).to(tl.float32)
    key = tl.load(k_ptr + (sequence * groups + group) * K + k, mask=k < K, other=0.0).to(tl.float32)
    value = tl.load(v_ptr + (sequence * heads + head) * V + v, mask=v < V, other=0.0).to(tl.float32)
    at, inside = _state_tile(state_ptr, sequence, heads, head, k, v, K, V)
    state = tl.load(at, mask=inside, other=0.0)
    if EXCLUSIVE:
        out = tl.sum(query[:, None] * state, axis=0)
        if bonus_ptr is not None:
            weight = tl.load(bonus_ptr + head * K + k, mask=k < K, other=0.0).to(tl.float32)
            out += tl.sum(query * weight * key, axis=0) * value
    if MODE == 1:
        state *= tl.exp2(tl.load(g_ptr + sequence * g_stride + head).to(tl.float32) * LOG2_E)
    if MODE == 2:
        g = tl.load(g_ptr + (sequence * heads + head) * K + k, mask=k < K, other=0.0).to(tl.float32)
        state *= tl.exp2(g * LOG2_E)[:, None]
    state += key[:, None] * value[None, :]
    if not EXCLUSIVE:
        out = tl.sum(query[:, None] * state, axis=0)
    tl.store(at, state, mask=inside)
    tl.store(out_ptr + (sequence * heads + head) * V + v, (out * scale).to(out_ptr.dtype.element_ty), mask=v < V)
