"""What decayed linear attention keeps in memory beside its inputs. Torch-free; see `archcompass.kernels.held`."""

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.held import Held
from archcompass.kernels.linear_attention.cost import Decay, default_chunk_size

# Elements of the largest temporary that the torch form computes at once (CACHED_ELEMENTS in chunked.py).
PIECE_ELEMENTS = 1 << 17


def linear_attention_held(
    *,
    batch: int,
    new_tokens: int,
    key_groups: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    decay: Decay,
    element_bytes: int,
    chunk_size: int | None = None,
    fused: bool = True,
) -> Held:
    """Arguments as in `linear_attention_cost`; `fused` when Triton kernels run it.

    The torch form writes the output, works on a few chunks at a time, and with gradients on all of them, each with the
    state before it. Heads that decay too strongly for its centred form are made once more, and nothing of that is kept.
    """
    chunk = chunk_size or default_chunk_size(decay, new_tokens)
    chunks = batch * ceil_div(new_tokens, chunk)
    rows = chunks * chunk if new_tokens > 1 else batch
    values, keys = rows * heads * value_dim, rows * key_groups * key_dim
    state = heads * key_dim * value_dim
    if fused or new_tokens <= 1:
        return Held(values * element_bytes + 4 * batch * state, chunks * state * 4, chunks * state * 4)
    widest = heads * chunk * max(value_dim, key_dim, chunk)
    pieces = min(chunks, max(batch, PIECE_ELEMENTS // widest))
    peak = values * element_bytes + 4 * (1.5 * batch * state + pieces * (widest + 3 * state))
    flowing = 8.0 * chunks * state  # gradients of all chunks' states, from the outputs and from the chunk after
    scores = rows * heads * chunk
    if decay == "vector":
        saved = element_bytes * (2 * values + 7 * keys + scores) + 56 * keys + chunks * state * (4 + element_bytes)
        return Held(peak + 4 * keys + 0.5 * values * element_bytes, saved, flowing)
    if decay == "scalar":
        saved = element_bytes * (2 * values + rows * key_groups * chunk + chunks * state) + 4 * chunks * state
        return Held(peak, saved, flowing)
    saved = element_bytes * (2 * values + 4 * keys + scores + chunks * state)
    return Held(peak, saved, flowing)
