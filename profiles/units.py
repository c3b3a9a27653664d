"""Quantities as people write them: "24GB", "24GiB", "1008GB/s", "165 TFLOPS".

GB is 10^9 bytes and GiB 2^30; neither is ever read as the other.
"""

import math
import re

from archcompass.errors import InputError

GB = 10**9
GIB = 2**30

_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_QUANTITY = re.compile(r"\s*(?P<number>\d+(?:[._]\d+)*(?:e[+-]?\d+)?)\s*(?P<unit>[a-z/]*)\s*", re.IGNORECASE)


def parse_bytes(value: str | float, field: str = "memory") -> int:
    """Bytes of "24GB", "24GiB", "512 MB"; a bare number below 2^20 is read as GB, a larger one as bytes.

    Raises:
        InputError: it is no amount of memory, or not positive.
    """
    number, unit = _split(value, field, "an amount of memory such as 24GB or 24GiB")
    if not unit:
        return _positive(number * GB if number < 2**20 else number, field, value)
    prefix = unit.removesuffix("b") if unit.endswith("b") else unit
    scale = (_BINARY | _DECIMAL).get(prefix)
    if scale is None or not prefix:
        raise InputError(f"{field} is {value!r}: write an amount of memory such as 24GB or 24GiB")
    return _positive(number * scale, field, value)


def parse_bandwidth(value: str | float, field: str = "bandwidth") -> float:
    """Bytes per second of "1008GB/s" or "3.35TB/s"; a bare number is GB/s.

    Raises:
        InputError: it is no bandwidth, or not positive.
    """
    number, unit = _split(value, field, "a bandwidth such as 1008GB/s")
    prefix = (unit or "gb/s").removesuffix("/s").removesuffix("ps").removesuffix("b")
    scale = (_BINARY | _DECIMAL).get(prefix)
    if scale is None or not prefix:
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
    return float(_positive(number * _DECIMAL[match.group(1)], field, value))


def _split(value: str | float, field: str, wanted: str) -> tuple[float, str]:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{field} is {value!r}: write {wanted}")
    if isinstance(value, int | float):
        return float(value), ""
    match = _QUANTITY.fullmatch(value) if len(value) < 64 else None
    if match is None:
        raise InputError(f"{field} is {value[:64]!r}: write {wanted}")
    return float(match["number"].replace("_", "")), match["unit"].lower()


def _positive(number: float, field: str, value: str | float) -> int:
    if number < 1 or number > 1e21:
        raise InputError(f"{field} is {value!r}: it must be positive and possible")
    return int(number)
