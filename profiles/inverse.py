"""The ledger asked backwards: the longest context, the largest batch, the smallest machine that holds a request.

Memory never falls as context or batch grows (tests/profiles/test_laws.py), so bisection finds the edge exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware, known
from archcompass.profiles.ledger import memory
from archcompass.profiles.request import Request

LONGEST = 2**30
MOST = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a request can grow on its machine, and how little holds it.

    Attributes:
        longest_prompt: tokens of each prompt, all else as asked; 0 where none fit, None where nothing bounds them.
        largest_batch: sequences of the length that was asked; 0 where not even one fits.
        meant_for: tokens of prompt and answer that the model was made for, whatever fits; None where nobody says.
        smallest_machine: of the same vendor and kind (of all, where there are none), by `Hardware.tag`; None where none does.
    """

    longest_prompt: int | None
    largest_batch: int
    meant_for: int | None
    smallest_machine: str | None


def limits(spec: ModelSpec, request: Request, hardware: Hardware) -> Limits:
    """All inverse questions at once, for `request` on `hardware`."""
    alike = [card for card in known() if (card.vendor, card.kind) == (hardware.vendor, hardware.kind)]
    smallest = smallest_machine(spec, request, alike or None)
    return Limits(
        longest_prompt=longest_context(spec, request, hardware),
        largest_batch=largest_batch(spec, request, hardware),
        meant_for=spec.max_position_embeddings,
        smallest_machine=smallest.tag if smallest else None,
    )


def longest_context(spec: ModelSpec, request: Request, hardware: Hardware) -> int | None:
    """Most tokens of prompt, with what `request` generates after it, that fit; 0 when none do, None when nothing bounds
    them (constant state, and a prefill in chunks)."""

    def fits(tokens: int) -> bool:
        return memory(spec, replace(request, prompt=tokens), hardware).fits

    found = _last(fits, LONGEST)
    return None if found == LONGEST else found


def largest_batch(spec: ModelSpec, request: Request, hardware: Hardware) -> int:
    """Most sequences of this length that fit at once; 0 when not even one does."""
    return _last(lambda count: memory(spec, replace(request, batch=count), hardware).fits, MOST)


def smallest_machine(
    spec: ModelSpec, request: Request, candidates: Iterable[Hardware] | None = None, *, most_cards: int = 8
) -> Hardware | None:
    """The least memory that holds `request`: one card if any does, else the fewest of the smallest; None when none can."""
    cards = sorted(candidates if candidates is not None else known(), key=lambda card: card.memory_bytes)
    count = 1
    while count <= most_cards:
        for card in cards:
            several = replace(card, count=count)
            if memory(spec, request, several).fits:
                return several
        count *= 2
    return None


def needed_bytes(spec: ModelSpec, request: Request, hardware: Hardware) -> float:
    """Memory one card of `hardware` would need for `request`."""
    return memory(spec, request, hardware).per_card_bytes


def _last(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest number up to `ceiling` that fits, 0 when 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < ceiling and fits(high):
        low, high = high, high * 2
    if high >= ceiling:
        if fits(ceiling):
            return ceiling
        high = ceiling
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
