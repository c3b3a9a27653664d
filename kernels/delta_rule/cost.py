"""What the delta rule costs, with a scalar or a vector decay, and in its diagonal-plus-low-rank form.

FLOPs are those of `chunked.py`, matrix product by matrix product, so that `torch.utils.flop_counter` counts the same
integer on the meta device. The unit triangular inverse is built from matrix products and is therefore counted; rank-one
updates and everything elementwise are not. The last chunk is padded, and its padding is work like any other.

Bytes are those of the GPU kernels: every input read once, every output written once, and between the kernels the
inverse (C x C per chunk), W, U and V' (K, V and V wide) and the state at the start of every chunk, each written once
and read once.
"""

from collections.abc import Iterator
from typing import Any, Literal

from archcompass.kernels.cost import Cost, ceil_div, repeated

Decay = Literal["none", "scalar", "vector"]

CHUNK_SIZE = 64
SMALLEST_CHUNK = 16
STATE_ELEMENT_BYTES = 4
GATE_ELEMENT_BYTES = 4


def effective_chunk(new_tokens: int, chunk_size: int = CHUNK_SIZE) -> int:
    """The chunk that is really used: `chunk_size`, or the power of two that holds a shorter sequence (16 or more)."""
    return min(chunk_size, max(SMALLEST_CHUNK, 1 << max(new_tokens - 1, 0).bit_length()))


def delta_rule_cost(
    *,
    batch: int,
    new_tokens: int,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    decay: Decay,
    element_bytes: int,
    chunk_size: int = CHUNK_SIZE,
) -> Cost:
    """One forward call of `delta_rule`: a prompt of `new_tokens` per sequence, or one step when `new_tokens` is 1.

    Args:
        batch: sequences.
        new_tokens: tokens of each sequence in this call.
        key_heads: heads of q and k; each serves heads / key_heads heads of v.
        heads: heads of v, beta and the state.
        key_dim: K, width of q and k per head.
        value_dim: V, width of v per head.
        decay: "none" (DeltaNet), "scalar" (Gated DeltaNet) or "vector" (Kimi Delta Attention).
        element_bytes: bytes of one element of q, k, v and the output; gates count as float32.
        chunk_size: C, a power of two.
    """
    gates = heads * {"none": 1, "scalar": 2, "vector": 1 + key_dim}[decay]
    inputs = 2 * key_heads * key_dim + heads * value_dim
    io_bytes = batch * new_tokens * (element_bytes * (inputs + heads * value_dim) + GATE_ELEMENT_BYTES * gates)
    state = batch * heads * key_dim * value_dim
    state_bytes = 2 * state * STATE_ELEMENT_BYTES
    if new_tokens <= 1:
        return Cost(4 * state * new_tokens, io_bytes, state_bytes * new_tokens)
    chunk = effective_chunk(new_tokens, chunk_size)
    chunks = batch * ceil_div(new_tokens, chunk)
    flops = chunks * heads * (inverse_flops(chunk) + _pass_flops(chunk, key_dim, value_dim))
    if decay == "vector":
        flops += chunks * heads * _halving_flops(chunk, key_dim, pairs=2)
    else:
        flops += chunks * key_heads * 2 * _product(chunk, key_dim, chunk)
    spilled = heads * chunk * (chunk + key_dim + 2 * value_dim) + heads * key_dim * value_dim
    return Cost(flops, io_bytes + 2 * element_bytes * chunks * spilled, state_bytes)


def dplr_cost(
    *,
    batch: int,
    new_tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int,
    chunk_size: int = CHUNK_SIZE,
) -> Cost:
    """One forward call of `dplr` (RWKV-7); arguments as in `delta_rule_cost`. The log decay counts as float32."""
    inputs = 4 * key_dim + value_dim
    per_token = element_bytes * (inputs + value_dim) + GATE_ELEMENT_BYTES * key_dim
    io_bytes = batch * new_tokens * heads * per_token
    state = batch * heads * key_dim * value_dim
    state_bytes = 2 * state * STATE_ELEMENT_BYTES
    if new_tokens <= 1:
        return Cost(4 * state * new_tokens, io_bytes, state_bytes * new_tokens)
    chunk = effective_chunk(new_tokens, chunk_size)
    chunks = batch * ceil_div(new_tokens, chunk)
    per_chunk = (
        _halving_flops(chunk, key_dim, pairs=4)
        + inverse_flops(chunk)
        + _product(2 * chunk, chunk, value_dim)
        + _pass_flops(chunk, key_dim, value_dim)
        + _product(key_dim, chunk, value_dim)
    )
    spilled = heads * (chunk * (chunk + key_dim + 2 * value_dim) + key_dim * value_dim)
    return Cost(chunks * heads * per_chunk, io_bytes + 2 * element_bytes * chunks * spilled, state_bytes)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _pass_flops(chunk: int, key_dim: int, value_dim: int) -> int:
    """Reading the state for queries and keys, solving, mixing, and writing the state."""
    read = _product(2 * chunk, key_dim, value_dim)
    solve_and_mix = 2 * _product(chunk, chunk, value_dim)
    return read + solve_and_mix + _product(key_dim, chunk, value_dim)


def _halves(chunk: int) -> Iterator[int]:
    size = 1
    while size < chunk:
        yield size
        size *= 2


def inverse_flops(chunk: int) -> int:
    """Two products of m x m blocks per pair of blocks, for m = 2, 4, ... C/2; blocks of one need none."""
    return sum(chunk // (2 * size) * 2 * _product(size, size, size) for size in _halves(chunk) if size > 1)


def _halving_flops(chunk: int, key_dim: int, *, pairs: int) -> int:
    """Scores under a vector decay: at each halving, the later half of a block meets its earlier half."""
    return sum(chunk // (2 * size) * pairs * _product(size, key_dim, size) for size in _halves(chunk))


EXAMPLE = {
    "batch": 1, "new_tokens": 4096, "key_heads": 16, "heads": 32, "key_dim": 128, "value_dim": 128, "decay": "scalar",
    "element_bytes": 2,
}  # fmt: skip


def alternatives(*, new_tokens: int, **sizes: Any) -> dict[str, Cost]:
    """Work of each backend, sizes as `delta_rule_cost`; the formula is as many single steps as there are tokens."""
    cost = delta_rule_cost(new_tokens=new_tokens, **sizes)
    steps = repeated(delta_rule_cost(new_tokens=1, **sizes), new_tokens)
    return {"triton": cost, "torch": cost, "reference": steps}
