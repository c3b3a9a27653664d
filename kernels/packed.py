"""Packed sequences: many sequences of any length side by side in one batch of one, marked by their boundaries."""

from collections.abc import Sequence
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


def same_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuses a tensor of another shape, by its name."""
    if tensor.shape != torch.Size(shape):
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
