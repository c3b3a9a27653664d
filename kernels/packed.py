"""Packed sequences: many sequences of any length side by side in one batch of one, marked by their boundaries."""

from itertools import pairwise

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
