"""What a diagonal linear recurrence costs. Torch-free."""

from typing import Any

from archcompass.kernels.cost import Cost, repeated

ELEMENT_BYTES = 4  # decay, input and output are float32: the recurrence compounds every rounding


def diagonal_scan_cost(*, batch: int, new_tokens: int, channels: int, rows: int = 1) -> Cost:
    """Cost of one forward call on `batch` sequences of `new_tokens` tokens.

    All of it is elementwise, so no FLOPs count. The bytes are decay, input and output once each, and one state per
    channel read and written; `rows` inputs share a decay.
    """
    elements = batch * new_tokens * channels
    state_bytes = 2 * batch * rows * channels * ELEMENT_BYTES if new_tokens else 0
    return Cost(0, (1 + 2 * rows) * elements * ELEMENT_BYTES, state_bytes)


EXAMPLE = {"batch": 1, "new_tokens": 4096, "channels": 4096}


def alternatives(*, new_tokens: int, **sizes: Any) -> dict[str, Cost]:
    """Work of each backend, sizes as `diagonal_scan_cost`; the formula is as many single steps as there are tokens."""
    cost = diagonal_scan_cost(new_tokens=new_tokens, **sizes)
    steps = repeated(diagonal_scan_cost(new_tokens=1, **sizes), new_tokens)
    return {"triton": cost, "torch": cost, "reference": steps}
