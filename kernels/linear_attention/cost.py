"""What decayed linear attention costs: FLOPs of the chunked form and of a single step, and the bytes they move.

Torch-free. The FLOPs are the matrix products of the torch path, exactly as `torch.utils.flop_counter` counts them on
meta tensors, when the time is a multiple of the chunk, and for a single step.
"""

from typing import Any, Literal

from archcompass.kernels.cost import Cost, ceil_div, repeated

Decay = Literal["none", "constant", "scalar", "vector"]

STATE_ELEMENT_BYTES = 4  # the state is float32 whatever the inputs are
SMALLEST_CHUNK = 16


def default_chunk_size(decay: Decay, new_tokens: int) -> int:
    """Tokens per chunk: a power of two, no longer than the smallest one that covers `new_tokens`."""
    covering = 1 << max(new_tokens - 1, 0).bit_length()
    return min(32 if decay == "vector" else 64, max(SMALLEST_CHUNK, covering))


def linear_attention_cost(
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
    bonus: bool = False,
) -> Cost:
    """Cost of one forward call on `batch` sequences of `new_tokens` tokens.

    With chunks of C tokens, heads of K x V and G groups of shared queries and keys, the FLOPs per token are
    2 C K G (scores) + 2 C V H (scores times values) + 4 K V H (the state: written, and read by the queries). A vector
    decay gives every head its own scores, and takes them from K H (C - 1) FLOPs by halving the chunk again and again,
    which leaves out what lies above the diagonal. One token runs the recurrence instead: 2 K V H for the read; the
    outer product k v^T is elementwise and counts nothing. A bonus adds 2 K H.

    The bytes are queries, keys, values, decay and output once each; the state is read and written once, and once more
    per chunk where chunks pass it on.

    Args:
        key_groups: distinct queries and keys (G); each is shared by `heads // key_groups` heads.
        decay: shape of the log decay.
        element_bytes: size of one element of q, k, v and of the output.
        chunk_size: tokens per chunk; None takes the default of the torch path.
        bonus: whether the current token enters through a bonus (RWKV-6).
    """
    tokens = batch * new_tokens
    state_bytes = batch * heads * key_dim * value_dim * STATE_ELEMENT_BYTES
    gate_bytes = {"none": 0, "constant": 0, "scalar": 4 * heads, "vector": 4 * heads * key_dim}[decay]
    activation_bytes = tokens * (element_bytes * 2 * (key_groups * key_dim + heads * value_dim) + gate_bytes)
    bonus_flops = 2 * tokens * heads * key_dim if bonus else 0
    if new_tokens <= 1:
        flops = 2 * tokens * heads * key_dim * value_dim + bonus_flops
        return Cost(flops, activation_bytes, 2 * state_bytes if new_tokens else 0)
    chunk = chunk_size or default_chunk_size(decay, new_tokens)
    chunks = ceil_div(new_tokens, chunk)
    shared_score_flops, own_score_flops = 2 * chunk * key_dim * key_groups, key_dim * heads * (chunk - 1)
    score_flops = own_score_flops if decay == "vector" else shared_score_flops
    per_token = score_flops + 2 * chunk * value_dim * heads + 4 * key_dim * value_dim * heads
    return Cost(batch * chunks * chunk * per_token + bonus_flops, activation_bytes, 2 * state_bytes * chunks)


EXAMPLE = {
    "batch": 1, "new_tokens": 4096, "key_groups": 1, "heads": 80, "key_dim": 128, "value_dim": 64, "decay": "scalar",
    "element_bytes": 2,
}  # fmt: skip


def alternatives(*, new_tokens: int, **sizes: Any) -> dict[str, Cost]:
    """Work of each backend, sizes as `linear_attention_cost`; the formula is as many single steps as there are tokens."""
    cost = linear_attention_cost(new_tokens=new_tokens, **sizes)
    steps = repeated(linear_attention_cost(new_tokens=1, **sizes), new_tokens)
    return {"triton": cost, "torch": cost, "reference": steps}
