"""What attention over selected keys costs. Torch-free."""

from archcompass.kernels.cost import Cost


def selected_attention_cost(
    *,
    batch: int,
    new_tokens: int,
    slots: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int,
) -> Cost:
    """The cost of one forward: every query meets `slots` keys per key-value head, those it may not see included.

    Bytes: queries and outputs once, and the selected keys and values, which every query reads for itself.
    """
    width = key_dim + value_dim
    pairs = batch * new_tokens * slots
    return Cost(
        flops=2 * pairs * heads * width,
        activation_bytes=batch * new_tokens * heads * width * element_bytes,
        state_bytes=pairs * kv_heads * width * element_bytes,
    )
