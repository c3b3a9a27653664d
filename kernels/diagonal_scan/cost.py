"""What a diagonal linear recurrence costs. Torch-free."""

from archcompass.kernels.cost import Cost

ELEMENT_BYTES = 4  # decay, input and output are float32: the recurrence compounds every rounding


def diagonal_scan_cost(*, batch: int, new_tokens: int, channels: int, rows: int = 1) -> Cost:
    """Cost of one forward call on `batch` sequences of `new_tokens` tokens.

    All of it is elementwise, so no FLOPs count. The bytes are decay, input and output once each, and one state per
    channel read and written; `rows` inputs share a decay.
    """
    elements = batch * new_tokens * channels
    state_bytes = 2 * batch * rows * channels * ELEMENT_BYTES if new_tokens else 0
    return Cost(0, (1 + 2 * rows) * elements * ELEMENT_BYTES, state_bytes)
