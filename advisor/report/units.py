"""Numbers as people read them. GB is 10⁹ bytes, GiB 2³⁰; memory is told in GB, as cards are sold."""

from __future__ import annotations


def count(value: float) -> str:
    """1_234_000_000 -> '1.2B'. Parameters and tokens."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_three(value / size)}{letter}"
    return f"{value:.0f}"


def tokens(value: float) -> str:
    """131072 -> '128k'. Contexts are powers of two more often than not."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if value >= size and value % (size // 2 if size == 2**20 else size) == 0:
            return f"{value / size:g}{letter}"
    return count(value)


def gb(value: float) -> str:
    """Bytes -> '20.9 GB', '14 MB'."""
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size * 0.9995:
            return f"{_three(value / size)} {name}"
    return f"{value:.0f} B"


def duration(milliseconds: float) -> str:
    """Milliseconds -> '9.8 s', '54 ms', '2.1 min'."""
    if milliseconds >= 3_600_000:
        return f"{_three(milliseconds / 3_600_000)} h"
    if milliseconds >= 120_000:
        return f"{_three(milliseconds / 60_000)} min"
    if milliseconds >= 1000:
        return f"{_three(milliseconds / 1000)} s"
    if milliseconds >= 1:
        return f"{_three(milliseconds)} ms"
    return f"{_three(milliseconds * 1000)} µs"


def rate(value: float, unit: str = "tok/s") -> str:
    """Tokens per second."""
    return f"{count(value) if value >= 10_000 else _three(value)} {unit}"


def _three(value: float) -> str:
    """Three figures at most, never more decimals than mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"
