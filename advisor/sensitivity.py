"""What would change the answer: the smallest change of each input, found by asking the same engine again.

A family that only comes first because nothing else fits, against a veto, is no answer to change to and is left out.

Numbers are bisected between the nearest value that keeps the family and the nearest that changes it, to within a few per cent;
words are tried one step at a time, nearest first. Only the decision is asked, not the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log2, sqrt
from typing import Any

from archcompass.advisor.decide import Decision, family_of, trusted_family
from archcompass.advisor.result import Result
from archcompass.advisor.sizing.shapes import Family
from archcompass.advisor.units import say_bytes, say_tokens
from archcompass.advisor.workload import Workload, choices


@dataclass(frozen=True, kw_only=True)
class Flip(Result):
    """A change of one input that changes the family.

    Attributes:
        change: in words.
        family: what the answer becomes.
        key, value: the input and a value at which the answer is that family.
        distance: octaves for numbers, steps for words; small is near.
    """

    change: str
    family: Family
    key: str
    value: Any
    distance: float


WORDS = ("breadth", "knowledge", "recall", "reasoning", "accuracy", "prefix_reuse", "ecosystem")

NUMBERS = {"context": (256, 2**24), "concurrency": (1, 4096), "vram": (10**9, 10**12)}
"""How far each number is moved."""

FAR = {"context": 8.0, "concurrency": 8.0, "vram": 3.0}
"""Octaves beyond which a change is no longer a small one."""

FACTOR = 4.0
"""The coarse step of a number, before it is bisected."""

PRECISE = 1.04
"""Bisection ends when both sides are this close."""


def flips(decision: Decision, limit: int = 8) -> list[Flip]:
    """The smallest changes that change the family, nearest first."""
    work, family = decision.reading.workload, decision.family
    if family is None:
        return []
    found = [*_numbers(decision, family), *_words(work, family), *_stream(work, family)]
    return sorted(found, key=lambda flip: flip.distance)[:limit]


OFTEN = 8
"""How many times more or less a length or a load often turns out to be than was thought."""


def turns_on(decision: Decision, key: str) -> bool:
    """Whether another ordinary value of an input changes the family: any word, a number eight times larger or smaller."""
    work, now = decision.reading.workload, getattr(decision.reading.workload, key)
    if isinstance(now, int):
        others: Sequence[Any] = (max(1, now // OFTEN), now * OFTEN)
    else:
        others = choices(key) if key in WORDS else ()
    return any(trusted_family(work.varied(**{key: other})) not in (None, decision.family) for other in others)


def _words(work: Workload, family: Family) -> Iterator[Flip]:
    for key in WORDS:
        words = choices(key)
        at = words.index(getattr(work, key))
        steps = sorted((abs(index - at), index) for index in range(len(words)) if index != at)
        seen: set[bool] = set()
        for distance, index in steps:
            upward = index > at
            if upward in seen:
                continue
            other = trusted_family(work.varied(**{key: words[index]}))
            if other is not None and other != family:
                seen.add(upward)
                yield Flip(
                    change=_said(key, words[index]), family=other, key=key, value=words[index], distance=float(distance)
                )


def _said(key: str, word: str) -> str:
    return {
        "prefix_reuse": f"with {word} reuse of prompts",
        "ecosystem": "if only mature tools are accepted" if word == "mature" else "if young tools are accepted",
        "knowledge": {"weights": "if it must know by heart", "documents": "if documents supply the facts"}.get(
            word, "if knowledge comes from both"
        ),
    }.get(key, f"with {key} {word}")


def _stream(work: Workload, family: Family) -> Iterator[Flip]:
    if work.stream or work.unbounded:
        return
    other = trusted_family(work.varied(context="unbounded", stream=True))
    if other is not None and other != family:
        yield Flip(change="if the input never ends", family=other, key="context", value="unbounded", distance=4.0)


def _numbers(decision: Decision, family: Family) -> Iterator[Flip]:
    work = decision.reading.workload
    for key, (low, high) in NUMBERS.items():
        now = decision.reading.hardware.memory_bytes if key == "vram" else getattr(work, key)
        if not isinstance(now, int):
            continue
        reach = 2.0 ** FAR[key]
        for end in (max(min(low, now), now / reach), min(max(high, now), now * reach)):
            flip = _nearest(work, family, key, now, end)
            if flip is not None:
                yield flip


def _nearest(work: Workload, family: Family, key: str, now: int, end: float) -> Flip | None:
    """Steps away from `now` towards `end` until the family changes, then bisects to the edge."""

    def ask(value: float) -> Family | None:
        """Another family that comes first at `value`, if one does."""
        found = trusted_family(work.varied(**{key: round(value)}))
        return None if found == family else found

    upward = end > now
    inside, outside, other = float(now), float(now), None
    while other is None and outside != end:
        inside, outside = outside, min(outside * FACTOR, end) if upward else max(outside / FACTOR, end)
        other = ask(outside)
    if other is None:
        return None
    edge, other = _bisect(ask, inside, outside, other)
    rounded = _rounded(key, edge, upward)
    at_rounded = ask(rounded)
    value, other = (rounded, at_rounded) if at_rounded else (edge, other)
    return Flip(
        change=_number_said(key, value, upward), family=other, key=key, value=value, distance=abs(log2(value / now))
    )


def _bisect(ask: Callable[[float], Family | None], inside: float, outside: float, other: Family) -> tuple[int, Family]:
    while max(inside, outside) / min(inside, outside) > PRECISE and abs(outside - inside) > 1:
        middle = sqrt(inside * outside)
        answer = ask(middle)
        if answer is None:
            inside = middle
        else:
            outside, other = middle, answer
    return round(outside), other


def _rounded(key: str, edge: int, upward: bool) -> int:
    """A value just past the edge that people would say."""
    tokens = 2**17 if edge >= 2**20 else 2**10 if edge >= 2**13 else 2**6
    unit = {"context": tokens, "concurrency": 1, "vram": 10**9 if edge >= 10**10 else 10**8}[key]
    return -(-edge // unit) * unit if upward else max(1, edge // unit) * unit


def _number_said(key: str, value: int, upward: bool) -> str:
    way = "above" if upward else "below"
    if key == "context":
        return f"{way} {say_tokens(value)} tokens"
    if key == "vram":
        return f"with {say_bytes(value)}" if upward else f"below {say_bytes(value)}"
    return f"with {value:,} sequences at once" if upward else f"with only {value:,} at once"


def decision_map(
    work: Workload, across: str, down: str, *, columns: Sequence[Any], rows: Sequence[Any]
) -> dict[str, Any]:
    """Which family comes first over two inputs: `cells[row][column]`, None where nothing fits, and where the user stands."""
    cells = [[family_of(work.varied(**{across: column, down: row})) for column in columns] for row in rows]
    return {
        "across": across,
        "down": down,
        "columns": list(columns),
        "rows": list(rows),
        "cells": cells,
        "here": {across: getattr(work, across), down: getattr(work, down)},
    }
