"""Packed sequences: several sequences side by side in one row, told apart by their boundaries (`cu_seqlens`)."""

from itertools import pairwise

from torch import Tensor

from archcompass.errors import InputError


def sequence_spans(cu_seqlens: Tensor, time: int) -> list[tuple[int, int]]:
    """Where each packed sequence starts and ends.

    Reads the boundaries on the host. On the meta device, where they are unknown, all sequences are taken to be equally
    long, so that shapes and counts of work still come out.

    Args:
        cu_seqlens: boundaries, [sequences + 1], from 0 to `time`.
        time: tokens of the row.

    Raises:
        InputError: boundaries that decrease, or do not run from 0 to `time`.
    """
    if cu_seqlens.device.type == "meta":
        sequences = cu_seqlens.numel() - 1
        bounds = [time * n // sequences for n in range(sequences + 1)] if sequences else [0]
    else:
        bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or (len(bounds) > 1 and bounds[-1] != time):
        raise InputError(f"cu_seqlens must run from 0 to the time ({time}); it is {bounds}")
    spans = list(pairwise(bounds))
    if any(end < start for start, end in spans):
        raise InputError(f"cu_seqlens must not decrease; it is {bounds}")
    return spans
