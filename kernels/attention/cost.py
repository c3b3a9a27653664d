"""Which keys a query sees, how many pairs that makes, and what attending to them costs. Torch-free.

Positions: key j of the buffer stands at j, and query i of `new_tokens` at `keys - new_tokens + i`, so the queries are
the last positions of the keys. A causal query at p sees the keys up to p; a window W leaves it the last W of them,
itself included; a chunk C (Llama 4) leaves it those of its own chunk, chunks being counted from absolute position 0,
which lies `key_offset` before key 0.
"""

from archcompass.errors import InputError
from archcompass.kernels.cost import Cost


def check_visibility(causal: bool, window: int | None, chunk: int | None, key_offset: int = 0) -> None:
    """Refuses a window or chunk that cannot be.

    Raises:
        InputError: window or chunk below 1, either of them without `causal`, or a negative key_offset.
    """
    for name, value in (("window", window), ("chunk", chunk)):
        if value is None:
            continue
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1 (the query's own key), or None for all keys")
        if not causal:
            raise InputError(f"{name} is {value} with causal=False; a {name} looks back only: set causal=True")
    if key_offset < 0:
        raise InputError(f"key_offset is {key_offset}; it is the absolute position of key 0 and cannot be below 0")


def first_visible(position: int, window: int | None, chunk: int | None, key_offset: int = 0) -> int:
    """The first key that a causal query at `position` sees, both counted from key 0."""
    first = 0
    if window is not None:
        first = max(first, position - window + 1)
    if chunk is not None:
        first = max(first, position - (position + key_offset) % chunk)
    return first


def visible_pairs(
    new_tokens: int,
    keys: int,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    key_offset: int = 0,
) -> int:
    """The number of (query, key) pairs of one head that attention looks at, in closed form.

    Raises:
        InputError: as `check_visibility`.
    """
    check_visibility(causal, window, chunk, key_offset)
    if not causal:
        return new_tokens * keys
    first_query = max(0, keys - new_tokens)
    return _pairs_before(keys, window, chunk, key_offset) - _pairs_before(first_query, window, chunk, key_offset)


def _pairs_before(position: int, window: int | None, chunk: int | None, key_offset: int) -> int:
    """Visible pairs of all causal queries at 0 .. position-1."""
    if chunk is None:
        return _triangle(position, window)
    first_chunk = min(position, chunk - key_offset % chunk)
    whole, rest = divmod(position - first_chunk, chunk)
    return _triangle(first_chunk, window) + whole * _triangle(chunk, window) + _triangle(rest, window)


def _triangle(size: int, window: int | None) -> int:
    """Pairs of `size` causal queries over their own keys, at most `window` each: sum of min(i + 1, window)."""
    rising = size if window is None else min(size, window)
    return rising * (rising + 1) // 2 + (size - rising) * rising


def reachable_keys(
    new_tokens: int,
    keys: int,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    key_offset: int = 0,
) -> int:
    """How many of the keys at least one of the new queries sees: what has to be read."""
    if not causal or new_tokens == 0:
        return keys if new_tokens else 0
    first_query = max(0, keys - new_tokens)
    return keys - min(keys, first_visible(first_query, window, chunk, key_offset))


def attention_cost(
    *,
    batch: int,
    new_tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    key_offset: int = 0,
    element_bytes: int,
) -> Cost:
    """The cost of one attention forward, projections not included.

    FLOPs are 2 (key_dim + value_dim) per visible pair and head: the triangle, not the square. Activations are the
    queries read and the outputs written; state bytes are the keys and values any query sees, read once, and those of
    the new tokens, written once.

    Raises:
        InputError: as `check_visibility`.
    """
    pairs = visible_pairs(new_tokens, keys, causal, window, chunk, key_offset)
    width = key_dim + value_dim
    touched = reachable_keys(new_tokens, keys, causal, window, chunk, key_offset) + min(new_tokens, keys)
    return Cost(
        flops=2 * width * pairs * heads * batch,
        activation_bytes=batch * new_tokens * heads * width * element_bytes,
        state_bytes=batch * touched * kv_heads * width * element_bytes,
    )


def dense_flops(*, batch: int, new_tokens: int, keys: int, heads: int, key_dim: int, value_dim: int) -> int:
    """FLOPs of the full rectangle of scores, seen or not.

    This is the convention of torch.utils.flop_counter, which ignores masks, and what it reports for `attention` on the
    meta device; it serves only to compare with such a counter.
    """
    return 2 * batch * heads * new_tokens * keys * (key_dim + value_dim)


def latent_attention_cost(
    *, batch: int, new_tokens: int, keys: int, heads: int, rank: int, rope_dim: int, element_bytes: int
) -> Cost:
    """The cost of one absorbed latent attention, causal, up projections not included.

    FLOPs are 2 (2 rank + rope_dim) per visible pair and head. Activations are the absorbed queries read and the outputs
    written; state bytes are the latents and rotary keys, read once, and those of the new tokens, written once.
    """
    width = rank + rope_dim
    return Cost(
        flops=2 * (width + rank) * visible_pairs(new_tokens, keys) * heads * batch,
        activation_bytes=batch * new_tokens * heads * (width + rank) * element_bytes,
        state_bytes=batch * (keys + min(new_tokens, keys)) * width * element_bytes,
    )


def sparse_attention_cost(
    *,
    batch: int,
    new_tokens: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    slots: int,
    block_size: int,
    element_bytes: int,
) -> Cost:
    """The cost of attending to `slots` blocks of `block_size` keys per query; choosing them not included.

    Whole blocks count, and every query reads its own: FLOPs 2 (key_dim + value_dim) per pair and head.
    """
    width, pairs = key_dim + value_dim, batch * new_tokens * slots * block_size
    return Cost(
        flops=2 * width * pairs * heads,
        activation_bytes=batch * new_tokens * heads * width * element_bytes,
        state_bytes=(pairs + batch * new_tokens) * kv_heads * width * element_bytes,
    )


EXAMPLE = {
    "batch": 1, "new_tokens": 4096, "keys": 4096, "heads": 32, "kv_heads": 8, "key_dim": 128, "value_dim": 128,
    "element_bytes": 2,
}  # fmt: skip


def alternatives(
    *,
    batch: int,
    new_tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int,
) -> dict[str, Cost]:
    """Work of each backend for a causal call. The formula computes the whole rectangle, and passes its scores through
    memory eight times: product, scale, mask, sum, exponential, product."""
    cost = attention_cost(
        batch=batch, new_tokens=new_tokens, keys=keys, heads=heads, kv_heads=kv_heads, key_dim=key_dim,
        value_dim=value_dim, element_bytes=element_bytes,
    )  # fmt: skip
    dense = dense_flops(
        batch=batch, new_tokens=new_tokens, keys=keys, heads=heads, key_dim=key_dim, value_dim=value_dim
    )
    scores_bytes = 8 * batch * heads * new_tokens * keys * element_bytes
    return {
        "triton": cost,
        "torch": cost,
        "reference": Cost(dense, cost.activation_bytes + scores_bytes, cost.state_bytes),
    }
