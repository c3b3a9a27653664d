"""What could be had instead: models no other of which is better, smaller and faster at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

from archcompass.advisor.candidates import short_name
from archcompass.advisor.result import Result
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.search import Sized, fits, ledger, times, useful
from archcompass.advisor.sizing.shapes import Family, Shape, Style, build_spec

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Sizes that are looked at, as shares of each family's largest."""


@dataclass(frozen=True, kw_only=True)
class Point(Result):
    """One model on the front.

    Attributes:
        family, name, precision: which it is.
        quality: dense-equivalent parameters, sqrt(total · active).
        memory_bytes: over all cards.
        per_user: tokens per second for each user.
    """

    family: Family
    name: str
    precision: str
    quality: float
    memory_bytes: float
    per_user: float


def front(ask: Ask, sizes: Mapping[Family, Sized]) -> list[Point]:
    """The Pareto front of quality, memory and speed over families, sizes and precisions, best quality first."""
    if not ask.serves:
        return []
    found = [point for sized in sizes.values() if sized.fits for point in _points(ask, sized)]
    return sorted(
        (one for one in found if not any(_beats(other, one) for other in found)), key=lambda one: -one.quality
    )


def _points(ask: Ask, sized: Sized) -> Iterator[Point]:
    rungs = useful(sized.style, ask)
    top, total = rungs.index(sized.shape), sized.spec.parameters().total
    for share in SHARES:
        at = min(bisect_left(rungs, share * total, key=lambda shape: _total(sized.style, shape)), top)
        for precision in dict.fromkeys((sized.precision, ask.precisions[-1])):
            if fits(sized.style, rungs[at], ask, precision):
                yield _point(ask, sized.style, rungs[at], precision)


def _point(ask: Ask, style: Style, shape: Shape, precision: str) -> Point:
    spec = build_spec(style, shape)
    parameters, step = spec.parameters(), times(style, shape, ask, precision).step_ms
    return Point(
        family=style.family,
        name=short_name(spec),
        precision=precision,
        quality=sqrt(parameters.total * parameters.active),
        memory_bytes=ledger(style, shape, ask, precision).total_bytes,
        per_user=1e3 / step if step else 0.0,
    )


def _total(style: Style, shape: Shape) -> int:
    return build_spec(style, shape).parameters().total


def _beats(other: Point, one: Point) -> bool:
    """Whether `other` is as good in everything and better in something."""
    gains = (other.quality - one.quality, one.memory_bytes - other.memory_bytes, other.per_user - one.per_user)
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)
