"""Quantities as people write them ("128k" tokens, "24GB" of memory, "1.5m", "unbounded", "2 s"), and as they read them.

A suffix on tokens is binary, because that is how context windows are named: 128k is 131,072 and 1M is 1,048,576. A suffix
on bytes is what it says: GB is 10^9, GiB is 2^30.
"""

import math
import re
from collections.abc import Callable
from typing import Final

from archcompass.errors import InputError
from archcompass.profiles.units import BYTE_UNITS, bytes_of, split

UNBOUNDED: Final = "unbounded"

TOKEN_SUFFIXES = {"": 1, "k": 2**10, "ki": 2**10, "m": 2**20, "mi": 2**20, "g": 2**30, "b": 2**30, "gi": 2**30}

MILLISECONDS = {"": 1.0, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3, "min": 6e4}

ENDLESS = {"unbounded", "endless", "infinite", "inf", "unlimited"}


def plain(value: object) -> object:
    """The number in a text without a unit; anything else as it is.

    Raises:
        InputError: a text that is no number, or carries a unit.
    """
    if not isinstance(value, str):
        return value
    number, unit = split(value)
    if unit:
        raise InputError(f"is {value[:40]!r}; write a number without a unit")
    return number


def whole(value: object, *, low: int, high: int, unit: str = "") -> int:
    """`value` as a whole number between `low` and `high`.

    Raises:
        InputError: no number, a fraction, not finite, or out of the range; says the nearest that would do.
    """
    return int(within(plain(value), low=low, high=high, unit=unit, whole_number=True))


def within(value: object, *, low: float, high: float, unit: str = "", whole_number: bool = False) -> float:
    """`value` as a number between `low` and `high`.

    Raises:
        InputError: no number, not finite, or out of the range; says the nearest that would do.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"is {str(value)[:40]!r}; write a number")
    if not math.isfinite(value):
        raise InputError(f"is {value}; write a finite number")
    suffix = f" {unit}" if unit else ""
    if not low <= value <= high:
        near = low if value < low else high
        raise InputError(f"is {value:,}{suffix}; it must lie between {low:,} and {high:,}; nearest: {near:,}")
    if whole_number and value != int(value):
        raise InputError(f"is {value:,}{suffix}; write a whole number; nearest: {round(value):,}")
    return value


def tokens(value: object, *, low: int = 1, high: int = 2**40, unit: str = "tokens") -> int:
    """A number of tokens: 4096, "128k", "1.5m", "20 million", "100,000 tokens"; or of what `unit` says.

    Raises:
        InputError: no such quantity, or none between `low` and `high`.
    """
    if not isinstance(value, str):
        return whole(value, low=low, high=high, unit=unit)
    text = re.sub(r"\s*(tokens?|tok)$", "", value.strip(), flags=re.IGNORECASE)
    text = re.sub(r"\s*(million|mio)$", "e6", re.sub(r"\s*(thousand)$", "e3", text, flags=re.IGNORECASE))
    number, suffix = split(text)
    if suffix not in TOKEN_SUFFIXES:
        raise InputError(f"is {value[:40]!r}; the suffixes of tokens are k, M and G, as in '128k'")
    count = number * TOKEN_SUFFIXES[suffix]
    return whole(_rounded(count) if suffix or count.is_integer() else count, low=low, high=high, unit=unit)


def context(value: object) -> int | str:
    """A sequence length in tokens, or "unbounded" for one that never ends.

    Raises:
        InputError: neither.
    """
    if isinstance(value, str) and value.strip().lower() in ENDLESS:
        return UNBOUNDED
    return tokens(value, high=2**33)


def memory(value: object, *, low: int = 2**20, high: int = 10**13) -> int:
    """A memory size in bytes: "24GB", "24GiB", "512 MiB"; a bare number below a million is in GB.

    Raises:
        InputError: no such quantity, or none between 1 MiB and 10 TB.
    """
    if isinstance(value, str):
        number, unit = split(value)
        if unit and unit not in BYTE_UNITS:
            raise InputError(f"is {value[:40]!r}; the units of memory are MB, GB, TB, MiB, GiB and TiB, as in '24GB'")
    else:
        number, unit = within(value, low=-math.inf, high=math.inf), ""
    if not math.isfinite(number):
        raise InputError(f"is {value}; write a finite number")
    size = _rounded(bytes_of(number, unit))
    if not low <= size <= high:
        raise InputError(
            f"is {value}; it must lie between 1 MiB and 10 TB; nearest: {'1MiB' if size < low else '10TB'}"
        )
    return int(size)


def milliseconds(value: object) -> float:
    """A time in milliseconds: 500, "500ms", "2 s", "50us".

    Raises:
        InputError: no such quantity, or none between a nanosecond and a day.
    """
    number, unit = split(value) if isinstance(value, str) else (value, "")
    if unit not in MILLISECONDS:
        raise InputError(f"is {str(value)[:40]!r}; the units of time are us, ms and s, as in '500ms'")
    scaled = number * MILLISECONDS[unit] if isinstance(number, float) else number
    return float(within(scaled, low=1e-6, high=86_400_000.0, unit="ms"))


def _rounded(number: float) -> float:
    """`number` without the dust of binary fractions, where it can have any: 1.1k is 1,126 tokens."""
    return round(number) if abs(number) < 2**53 else number


def say_tokens(count: float | str) -> str:
    """Tokens for a reader: "128k", "1M", "4,352"."""
    if isinstance(count, str):
        return count
    for size, suffix in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if count >= size and count % (size // 8 if size > 2**10 else size) == 0:
            return f"{count / size:g}{suffix}"
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 2**10:,.0f}k" if count < 10 * 2**20 else f"{count / 2**20:,.0f}M"


def say_length(count: int | str) -> str:
    """A sequence for a reader: "128k tokens", or that it has no end."""
    return f"{say_tokens(count)} tokens" if isinstance(count, int) else "an endless input"


def say_bytes(size: float) -> str:
    """Bytes for a reader, in decimal units as cards are sold: "20.9 GB", "14 MB"."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= scale * NEARLY:
            return f"{_three(size / scale)} {unit}"
    return f"{size:.0f} B"


def say_count(count: float) -> str:
    """Parameters as models are named, in two figures: "31B", "3.4B", "350M"."""
    return _counted(count, lambda value: f"{value:.0f}" if value >= 9.95 else _three(value))


def say_figures(count: float) -> str:
    """Parameters, or whatever is many, in three figures: "31.2B", "3.4B", "350M"."""
    return _counted(count, _three)


def say_ms(milliseconds: float) -> str:
    """A time for a reader: "9.8 s", "340 ms", "2.1 min", "50 µs"."""
    for scale, least, unit in ((3.6e6, 3.6e6, "h"), (6e4, 1.2e5, "min"), (1e3, 1e3, "s"), (1.0, 1.0, "ms")):
        if milliseconds >= least * NEARLY:
            return f"{_three(milliseconds / scale)} {unit}"
    return f"{_three(milliseconds * 1e3)} µs" if milliseconds else "0 ms"


def say_rate(value: float, unit: str = "tok/s") -> str:
    """So many a second for a reader: "54.3 tok/s", "12.5k tok/s"."""
    return f"{say_figures(value) if value >= 10_000 else _three(value)} {unit}"


def say_spread(value: str, half: str) -> str:
    """A quantity with half its range, whose unit is said once: "9.8 s ±3.1", "1.1 s ±758 ms"."""
    number, _, unit = half.rpartition(" ")
    return f"{value} ±{number if value.endswith(f' {unit}') else half}"


def say_between(low: str, high: str) -> str:
    """A range whose unit is said once: "4.9 to 15 s", "758 ms to 1.1 s"."""
    number, _, unit = low.rpartition(" ")
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


NEARLY = 0.9995
"""From this share of a unit on, three figures would round up to it."""


def _counted(count: float, say: Callable[[float], str]) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale * NEARLY:
            return f"{say(count / scale)}{unit}"
    return f"{count:.0f}"


def _three(value: float) -> str:
    """Three figures at most, never more decimals than mean something."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= NEARLY else f"{value:.2f}"


def parameters(text: str, name: str) -> int:
    """Number of parameters from "300k", "1M"; decimal.

    Raises:
        InputError: it is none, or less than one.
    """
    try:
        number, unit = split(text)
        count = int(number * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[unit])
    except (InputError, KeyError, OverflowError, ValueError):
        raise InputError(f"{name} is {text[:40]!r}; write a number of parameters, such as 300k or 1M") from None
    if count < 1:
        raise InputError(f"{name} is {text[:40]!r}; it must be at least 1, such as 300k")
    return count
