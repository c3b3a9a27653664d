"""Steps of many sequences on a CPU: a step passes over its states four to six times, and memory is slower than the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

PIECE_BYTES = 1 << 22  # of states, which the second pass over them finds in the cache
WORTH_PIECES = 1 << 24  # bytes of states; up to here every pass finds all of them there


def overwriting(
    step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """step(*inputs, state=state), which overwrites the state; of many large states a few at a time.

    Args:
        step: one token of a recurrence, with outputs [batch, ...].
        state: [batch, ...].
        inputs: [batch, ...] each, or None.
    """
    if state.nbytes <= WORTH_PIECES or not state.is_cpu:
        return step(*inputs, state=state)
    count = max(1, PIECE_BYTES * state.shape[0] // state.nbytes)
    outputs = []
    for start in range(0, state.shape[0], count):
        here = slice(start, start + count)
        outputs.append(step(*(None if x is None else x[here] for x in inputs), state=state[here])[0])
    return torch.cat(outputs), state
