"""What the loss on top of a language model costs. Torch-free."""

from archcompass.kernels.cost import Cost


def linear_cross_entropy_cost(*, tokens: int, width: int, vocab: int, element_bytes: int, training: bool) -> Cost:
    """The loss of `tokens` positions over `vocab` classes, head included.

    FLOPs: 2 tokens width vocab for the logits, and with `training` as much again for each of the two gradients, which
    are computed in the same pass (the Triton kernels compute the logits once more, and their operators say so).
    Activations: hidden states read (and their gradients written); logits never leave their chunk.
    """
    passes = 3 if training else 1
    return Cost(
        flops=2 * tokens * width * vocab * passes,
        activation_bytes=tokens * width * element_bytes * (2 if training else 1),
    )
