"""What the delta rule keeps in memory beside its inputs. Torch-free; see `archcompass.kernels.held`."""

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.delta_rule.cost import Decay, effective_chunk
from archcompass.kernels.held import Held

SEGMENT = 512
"""Tokens that the torch form works on at once in inference (as in chunked.py)."""


def delta_rule_held(
    *,
    batch: int,
    new_tokens: int,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    decay: Decay,
    element_bytes: int,
    fused: bool = True,
) -> Held:
    """Arguments as in `delta_rule_cost`; `fused` when Triton kernels run it.

    Both forms pass the inverse, the decayed keys, what is written and the state at every chunk from kernel to kernel; the
    torch form makes a segment's terms in float32 first. Of a decay per head it is the centred form that is counted: of the
    exact one nothing is kept.
    """
    chunk, rows = effective_chunk(new_tokens), batch * new_tokens
    chunks = batch * ceil_div(new_tokens, chunk)
    state = heads * key_dim * value_dim
    keys, all_keys, values = key_heads * key_dim, heads * key_dim, heads * value_dim
    squares = heads * chunk
    if fused or new_tokens <= 1:
        passed = rows * (squares + all_keys + 2 * values) + chunks * state
        return Held(element_bytes * (passed + rows * values), element_bytes * passed)
    piece = min(new_tokens, SEGMENT) * batch
    outputs = rows * element_bytes * values
    if decay == "vector":
        peak = outputs + 4 * 3 * batch * state + piece * (4 * 9.5 * all_keys + squares * (4 + 2 * element_bytes))
        saved = rows * (element_bytes * (2 * values + 2 * all_keys + 3 * squares) + 4 * (31.5 * all_keys + squares))
        return Held(peak, saved + 1.5 * 4 * chunks * state)
    shared, faded = key_heads * chunk, 1 if decay == "scalar" else 0
    precise_keys, rounded_squares = (keys, squares) if element_bytes < 4 else (0, 0)
    terms = element_bytes * (2 * keys - values) + 4 * (precise_keys + shared + 3 * squares)
    through = element_bytes * (3 * keys + (1 + faded) * values + shared + squares) * piece
    through += element_bytes * 5 * chunk * batch * values
    peak = outputs + max(piece * terms, through + 4 * 4 * batch * state)
    narrow = 3 * keys + shared + rounded_squares + (3 + faded) * values
    saved = rows * (element_bytes * narrow + 4 * (precise_keys + shared + squares))
    saved += chunks * state * (4 * faded + element_bytes)
    return Held(peak, saved)


def dplr_held(
    *, batch: int, new_tokens: int, heads: int, key_dim: int, value_dim: int, element_bytes: int, fused: bool = True
) -> Held:
    """As `delta_rule_held`, for the diagonal-plus-low-rank form; arguments as in `dplr_cost`."""
    chunk, rows = effective_chunk(new_tokens), batch * new_tokens
    chunks = batch * ceil_div(new_tokens, chunk)
    state, keys, values = heads * key_dim * value_dim, heads * key_dim, heads * value_dim
    if fused or new_tokens <= 1:
        passed = rows * (heads * chunk + keys + 2 * values) + chunks * state
        return Held(element_bytes * (passed + rows * values), element_bytes * passed)
    piece = min(new_tokens, SEGMENT) * batch
    peak = rows * element_bytes * values + 4 * 23 * piece * keys + 4 * 2 * batch * state
    return Held(peak, rows * keys * (18 * element_bytes + 4 * 44))
