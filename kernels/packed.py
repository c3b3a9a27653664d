"""Packed sequences: many sequences of any length side by side in one batch of one, marked by their boundaries."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from archcompass.errors import InputError


def spans(cu_seqlens: Tensor, time: int) -> list[tuple[int, int]]:
    """Where each packed sequence starts and ends.

    On the meta device, where boundaries have no values, the sequences count as equally long.

    Args:
        cu_seqlens: [sequences + 1], not decreasing, from 0 to `time`.

    Raises:
        InputError: boundaries that do not run from 0 to `time`, or that decrease.
    """
    sequences = cu_seqlens.numel() - 1
    if cu_seqlens.device.type == "meta":
        bounds = [time * n // max(sequences, 1) for n in range(sequences + 1)]
    else:
        bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != (time if sequences else 0):
        raise InputError(f"cu_seqlens must run from 0 to the time ({time}); it is {bounds}")
    if any(end < start for start, end in pairwise(bounds)):
        raise InputError(f"cu_seqlens must not decrease; it is {bounds}")
    return list(pairwise(bounds))


def sequences(
    x: Tensor, size: Sequence[int], initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, list[tuple[int, int]] | None]:
    """The state before the first token of every sequence, and where packed sequences lie.

    Args:
        x: [batch, time, ...], of which the state takes device and precision: float64 for float64, else float32.
        size: of one sequence's state.
        initial_state: [batch or sequences, *size], or None for zeros.
        cu_seqlens: boundaries of packed sequences, or None for a batch.

    Raises:
        InputError: packed sequences in a batch that is not one, or a state of another shape.
    """
    if cu_seqlens is not None and x.shape[0] != 1:
        raise InputError(f"packed sequences need a batch of 1, not {x.shape[0]}")
    bounds = None if cu_seqlens is None else spans(cu_seqlens, x.shape[1])
    shape = (x.shape[0] if bounds is None else len(bounds), *size)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=x.device), bounds
    same_shape("initial_state", initial_state, shape)
    return initial_state.to(dtype), bounds


def over_sequences(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    like: Tensor,
    size: Sequence[int],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence over the whole batch at once, or over packed sequences one after the other.

    Args:
        run: called with the inputs and `state`, [batch, *size], the state before their first token; gives outputs
            [batch, time, ...] and the state after the last.
        inputs: [batch, time, ...] each, or None.
        like: what the outputs are shaped like.
        size, initial_state, cu_seqlens: as in `sequences`.

    Returns:
        outputs [batch, time, ...], and the last state of each sequence, [batch or sequences, *size].
    """
    state, bounds = sequences(like, size, initial_state, cu_seqlens)
    if bounds is None:
        return run(*inputs, state=state)
    outputs, states = [like[:, :0]], [state[:0]]
    for n, (start, end) in enumerate(bounds):
        pieces = [None if x is None else x[:, start:end] for x in inputs]
        out, last = run(*pieces, state=state[n : n + 1])
        outputs.append(out)
        states.append(last)
    return torch.cat(outputs, dim=1), torch.cat(states)


def same_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuses a tensor of another shape, by its name."""
    if tensor.shape != torch.Size(shape):
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
