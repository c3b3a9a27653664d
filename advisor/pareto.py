"""What could be had instead: models no other of which is better, smaller and faster at once.

Beside each family's recommended style, the search takes other counts of experts and windows, each sized anew. The share of
attention is not varied: what a smaller one costs is recall, which no proxy of quality here sees.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from archcompass.advisor.candidates import short_name
from archcompass.advisor.result import Result
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.search import Sized, fits, ledger, size, times, total_parameters, useful
from archcompass.advisor.sizing.shapes import Family, Shape, Style, build_spec, dense_equivalent
from archcompass.advisor.sizing.styles import WINDOW, WINDOW_PERIOD

EXPERTS = ((64, 8), (128, 8), (128, 4), (256, 8))
"""(routed experts, chosen per token) that are tried: DeepSeekMoE, Qwen 3, gpt-oss, DeepSeek-V3."""

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
        experts, experts_per_token, window: of its style; None where it has none.
    """

    family: Family
    name: str
    precision: str
    quality: float
    memory_bytes: float
    per_user: float
    experts: int | None
    experts_per_token: int | None
    window: int | None


def front(ask: Ask, sizes: Mapping[Family, Sized]) -> list[Point]:
    """The Pareto front of quality, memory and speed over families, sizes and precisions, best quality first."""
    if not ask.serves:
        return []
    tried = [*sizes.values(), *(size(style, ask) for sized in sizes.values() for style in _variants(sized.style))]
    found = list(dict.fromkeys(point for sized in tried if sized.fits for point in _points(ask, sized)))
    return sorted(
        (one for one in found if not any(_beats(other, one) for other in found)), key=lambda one: -one.quality
    )


def _variants(style: Style) -> Iterator[Style]:
    """Other experts, and attention with and without windows."""
    for experts, chosen in EXPERTS if style.experts else ():
        yield replace(style, experts=experts, chosen=chosen)
    if style.family in ("transformer", "moe") and style.full_every:
        yield replace(style, window=None, full_every=0)
    elif style.family in ("transformer", "moe") and style.window is None:
        yield replace(style, window=WINDOW, full_every=WINDOW_PERIOD)


def _points(ask: Ask, sized: Sized) -> Iterator[Point]:
    ask = replace(ask, parallel=sized.request.parallel)
    rungs = useful(sized.style, ask)
    if sized.shape not in rungs:
        return
    top, total = rungs.index(sized.shape), sized.spec.parameters().total
    for share in SHARES:
        at = min(bisect_left(rungs, share * total, key=lambda shape: total_parameters(sized.style, shape)), top)
        for precision in dict.fromkeys((sized.precision, ask.precisions[-1])):
            if fits(sized.style, rungs[at], ask, precision):
                yield _point(ask, sized.style, rungs[at], precision)


def _point(ask: Ask, style: Style, shape: Shape, precision: str) -> Point:
    spec = build_spec(style, shape)
    step = times(style, shape, ask, precision).step_ms
    return Point(
        family=style.family,
        name=short_name(spec),
        precision=precision,
        quality=dense_equivalent(spec),
        memory_bytes=ledger(style, shape, ask, precision).total_bytes,
        per_user=1e3 / step if step else 0.0,
        experts=style.experts or None,
        experts_per_token=style.chosen or None,
        window=style.window,
    )


def _beats(other: Point, one: Point) -> bool:
    """Whether `other` is as good in everything and better in something."""
    gains = (other.quality - one.quality, one.memory_bytes - other.memory_bytes, other.per_user - one.per_user)
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)
