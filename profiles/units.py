"""Quantities as people write them: "24GB", "24GiB", "1008GB/s", "165 TFLOPS".

GB is 10^9 bytes and GiB 2^30; neither is ever read as the other.
"""

import math
import re

from archcompass.errors import InputError

GB = 10**9
GIB = 2**30

_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

BYTE_UNITS = {"b": 1} | {prefix + end: size for prefix, size in (_DECIMAL | _BINARY).items() for end in ("", "b")}
"""Units of memory in lower case: "gb", "gib", "g"."""

_QUANTITY = re.compile(r"(?P<number>[+-]?(?:\d[\d,_ ]*)?(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>[a-zµ/]*)", re.IGNORECASE)


def split(text: str) -> tuple[float, str]:
    """The number and the lower-cased unit in `text`.

    Raises:
        InputError: no number at its front, or something after the unit.
    """
    match = _QUANTITY.fullmatch(text.strip()) if len(text) < 64 else None
    digits = re.sub("[,_ ]", "", match["number"]) if match else ""
    try:
        return float(digits), match["unit"].lower() if match else ""
    except ValueError:
        raise InputError(f"is {text[:40]!r}; write a number, with a suffix if you like") from None


def bytes_of(number: float, unit: str) -> float:
    """Bytes of a number with one of `BYTE_UNITS`; without a unit it is in GB below 2^20, in bytes from there on."""
    if unit:
        return number * BYTE_UNITS[unit]
    return number * GB if number < 2**20 else number


def parse_bytes(value: str | float, field: str = "memory") -> int:
    """Bytes of "24GB", "24GiB", "512 MB"; a bare number below 2^20 is read as GB, a larger one as bytes.

    Raises:
        InputError: it is no amount of memory, or not positive.
    """
    wanted = "an amount of memory such as 24GB or 24GiB"
    number, unit = _split(value, field, wanted)
    if unit and unit not in BYTE_UNITS:
        raise InputError(f"{field} is {value!r}: write {wanted}")
    return _positive(bytes_of(number, unit), field, value)


def parse_bandwidth(value: str | float, field: str = "bandwidth") -> float:
    """Bytes per second of "1008GB/s" or "3.35TB/s"; a bare number is GB/s.

    Raises:
        InputError: it is no bandwidth, or not positive.
    """
    number, unit = _split(value, field, "a bandwidth such as 1008GB/s")
    scale = BYTE_UNITS.get((unit or "gb/s").removesuffix("/s").removesuffix("ps"))
    if scale is None:
        raise InputError(f"{field} is {value!r}: write a bandwidth such as 1008GB/s")
    return float(_positive(number * scale, field, value))


def parse_flops(value: str | float, field: str = "tflops") -> float:
    """FLOP/s of "165", "165 TFLOPS" or "1.3PFLOPS"; a bare number is TFLOP/s.

    Raises:
        InputError: it is no rate, or not positive.
    """
    number, unit = _split(value, field, "a rate such as 165 or 165TFLOPS")
    match = re.fullmatch(r"([gtp])(?:flops?|ops?)?(?:/s)?", unit or "t")
    if match is None:
        raise InputError(f"{field} is {value!r}: write a rate such as 165 or 165TFLOPS")
    return float(_positive(number * {"g": 1e9, "t": 1e12, "p": 1e15}[match.group(1)], field, value))


def _split(value: str | float, field: str, wanted: str) -> tuple[float, str]:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{field} is {value!r}: write {wanted}")
    if isinstance(value, int | float):
        return float(value), ""
    try:
        return split(value)
    except InputError:
        raise InputError(f"{field} is {value[:64]!r}: write {wanted}") from None


def _positive(number: float, field: str, value: str | float) -> int:
    if not 1 <= number <= 1e21:
        raise InputError(f"{field} is {value!r}: it must be positive and possible")
    return int(number)
