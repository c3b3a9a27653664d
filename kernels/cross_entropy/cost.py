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


EXAMPLE = {"tokens": 4096, "width": 4096, "vocab": 128256, "element_bytes": 2, "training": True}


def alternatives(*, tokens: int, width: int, vocab: int, element_bytes: int, training: bool) -> dict[str, Cost]:
    """Work of each backend, the head (and its gradient) included.

    Logits pass through memory once as such and, with `training`, once as their gradient, each written and read; the
    kernels write the gradient alone, and compute the logits once more. The formula keeps them beside it in float32.
    """
    cost = linear_cross_entropy_cost(
        tokens=tokens, width=width, vocab=vocab, element_bytes=element_bytes, training=training
    ) + Cost(0, vocab * width * element_bytes * (2 if training else 1))
    logits = tokens * vocab
    passes = 2 * training * logits * element_bytes
    again = 2 * training * logits * width
    return {
        "triton": cost + Cost(again, passes),
        "torch": cost + Cost(0, passes + 2 * logits * element_bytes),
        "reference": cost + Cost(0, passes + 2 * logits * (element_bytes + 4)),
    }
