"""Measures this machine and keeps its efficiency table, which every later prediction for it uses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from archcompass.profiles import tables
from archcompass.profiles.efficiency import Efficiency


def calibrate(
    device: str = "cpu",
    *,
    progress: Callable[[float, str], None] | None = None,
    budget_seconds: float = 150.0,
    keep: bool = True,
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
    blocks: Collection[str] | None = None,
) -> tuple[Efficiency, Path | None]:
    """(the table, where it was kept or None).

    Args:
        device: "cpu" or "cuda".
        progress: told (share done, what is measured now).
        budget_seconds: blocks that would begin later are left out and named in the table.
        dtypes: which to measure; what is not measured is foreseen from the first.
        blocks: only these kinds of block; None measures all.
        keep: write it to the user's cache directory, whole or not at all.

    Raises:
        InputError: no such device here.
    """
    from archcompass.profiles.measure.calibrate import calibrate as measure
    from archcompass.profiles.measure.here import this_machine
    from archcompass.profiles.measure.model import silent

    hardware = this_machine(device)
    table = measure(device, progress=progress or silent, budget_seconds=budget_seconds, dtypes=dtypes, blocks=blocks)
    return table, tables.save(table, hardware) if keep else None
