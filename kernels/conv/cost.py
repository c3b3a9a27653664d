"""What a causal depthwise convolution costs. Torch-free."""

from archcompass.kernels.cost import Cost


def causal_conv_cost(*, batch: int, new_tokens: int, channels: int, width: int, element_bytes: int) -> Cost:
    """Cost of one forward call on `batch` sequences of `new_tokens` tokens.

    2 * width FLOPs per token and channel, for whole sequences and single steps alike: the operation is registered with
    this formula, so `torch.utils.flop_counter` reports it on every device (counted by itself, a depthwise convolution is
    seen as aten.convolution on one path and as elementwise work, that is nothing, on another). The bytes are input,
    output, and the `width - 1` tokens of state read and written.
    """
    elements = batch * new_tokens * channels
    state_bytes = batch * (width - 1) * channels * element_bytes
    return Cost(2 * elements * width, 2 * elements * element_bytes, 2 * state_bytes)


EXAMPLE = {"batch": 1, "new_tokens": 4096, "channels": 5376, "width": 4, "element_bytes": 2}


def alternatives(*, batch: int, new_tokens: int, channels: int, width: int, element_bytes: int) -> dict[str, Cost]:
    """Work of each backend. The formula writes and reads a product and a sum for every tap, each as large as the input."""
    cost = causal_conv_cost(
        batch=batch, new_tokens=new_tokens, channels=channels, width=width, element_bytes=element_bytes
    )
    passes = Cost(0, 4 * width * batch * new_tokens * channels * element_bytes)
    return {"triton": cost, "torch": cost, "reference": cost + passes}
