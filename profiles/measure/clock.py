"""Time of a call: warmed up, synchronised, repeated, told by its median and spread.

An accelerator is timed by its own events, a processor by the wall clock, or with a single thread by the time it worked for
this process, which other work on the machine does not lengthen. One method serves a whole table, since mixing two makes
jumps that are not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """Repeated times of one thing, in milliseconds.

    Attributes:
        runs: each run, in order, warm-up left out.
    """

    runs: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median."""
        return median(self.runs)

    @property
    def low(self) -> float:
        """Lower quartile (the least of fewer than four)."""
        return sorted(self.runs)[len(self.runs) // 4]

    @property
    def high(self) -> float:
        """Upper quartile (the most of fewer than four)."""
        return sorted(self.runs)[-1 - len(self.runs) // 4]

    @property
    def outliers(self) -> int:
        """Runs more than half as long again as the median: other work on the machine, most often."""
        return sum(run > 1.5 * self.ms for run in self.runs)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        return _by_events(call, device)
    now = processor_clock()
    start = now()
    call()
    return (now() - start) * 1e3


def processor_clock() -> Callable[[], float]:
    """Seconds of this process's own work with one thread, else of the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def repeat(
    call: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 50,
    warmups: int = 1,
) -> Times:
    """Runs `call` until `seconds` are over, at least `least` and at most `most` times, after `warmups` unheard ones."""
    for _ in range(warmups):
        call()
    synchronise(device)
    deadline = time.perf_counter() + seconds
    runs: list[float] = []
    while len(runs) < least or (len(runs) < most and time.perf_counter() < deadline):
        runs.append(once(call, device))
    return Times(tuple(runs))


def _by_events(call: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))
