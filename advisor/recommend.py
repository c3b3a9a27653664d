"""The answer: which family, how sure, why, sized how, and what would change it. Plain data; it never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING, Any, Literal

from archcompass.advisor.candidates import Candidate, candidate
from archcompass.advisor.decide import Decision, Veto
from archcompass.advisor.derived import HONEST_TOKENS, Quantity, derived
from archcompass.advisor.notes import contradictions, notes
from archcompass.advisor.published import Existing, existing
from archcompass.advisor.result import Result
from archcompass.advisor.rules import Finding
from archcompass.advisor.sensitivity import Flip, flips, turns_on
from archcompass.advisor.sizing.search import Sized
from archcompass.advisor.sizing.shapes import FAMILIES, Family
from archcompass.advisor.units import say_bytes, say_count, say_tokens
from archcompass.advisor.workload import Workload

if TYPE_CHECKING:
    from archcompass.advisor.pareto import Point


@dataclass(frozen=True, kw_only=True)
class Recommendation(Result):
    """What `recommend` answers; `model_dump(mode="json")` is what `recommend --json` prints.

    Attributes:
        workload: every key, given or taken.
        family: the one that comes first; the strongest rule's when nothing fits, and then `refusal` says so.
        confidence: 0 to 1.
        rules, candidates, flips, published: DESIGN's keys.
        derived: quantities worked out first.
        vetoes: what speaks against a family however well it fits.
        defaults: keys that were not given, with value and reason.
        notes, contradictions: sentences for the reader.
        hardware: the machine in a few figures.
        doubts: what lowered the confidence.
        front: models of families no veto speaks against, no other of which is better, smaller and faster at once; only with
            high effort.
        refusal: one line when nothing fits, else None; `needs_bytes` and `nearest` say what would.
    """

    workload: Workload
    family: Family
    confidence: float
    rules: list[Finding]
    candidates: list[Candidate]
    flips: list[Flip]
    published: list[Existing]
    derived: list[Quantity]
    vetoes: list[Veto]
    defaults: dict[str, dict[str, Any]]
    notes: list[str]
    contradictions: list[str]
    hardware: dict[str, Any]
    doubts: list[str]
    front: list[Point]
    refusal: str | None = None
    needs_bytes: float | None = None
    nearest: list[str] = field(default_factory=list)

    @property
    def pick(self) -> Candidate:
        """The candidate that comes first."""
        return self.candidates[0]


def recommend(
    workload: Workload, *, quick: bool = False, effort: Literal["normal", "high"] = "normal"
) -> Recommendation:
    """Rules, sizes and predictions for all four families.

    Args:
        workload: what is wanted.
        quick: leaves out `flips` and `published`.
        effort: "high" adds `front`.

    Raises:
        InputError: the card is not known, or cannot be.
    """
    decision = Decision.of(workload)
    sizes = {family: decision.sized(family) for family in FAMILIES}
    family = decision.family
    said = contradictions(decision.ask, family, sizes, decision.vetoes)
    sure, doubts = confidence(decision, said)
    refused, needs, nearest = (None, None, []) if family else refusal(decision, sizes)
    return Recommendation(
        workload=workload,
        family=family or decision.findings[0].family,
        confidence=sure,
        rules=list(decision.findings),
        candidates=[candidate(decision, each, rank, sizes[each]) for rank, each in enumerate(decision.order, start=1)],
        flips=[] if quick or family is None else flips(decision),
        published=[] if quick else existing(decision, sizes[decision.order[0]]),
        derived=list(derived(decision.ask, sizes)),
        vetoes=list(decision.vetoes),
        defaults={key: {"value": d.value, "reason": d.reason} for key, d in workload.defaulted.items()},
        notes=notes(decision.ask, family, sizes),
        contradictions=said,
        hardware=machine(decision),
        doubts=doubts,
        front=_front(decision, sizes) if effort == "high" else [],
        refusal=refused,
        needs_bytes=needs,
        nearest=nearest,
    )


def _front(decision: Decision, sizes: dict[Family, Sized]) -> list[Point]:
    from archcompass.advisor.pareto import front

    return front(decision.ask, {family: sized for family, sized in sizes.items() if not decision.distrust[family]})


def machine(decision: Decision) -> dict[str, Any]:
    """The machine in the figures that decide."""
    card = decision.reading.hardware
    return {
        "id": card.id,
        "name": card.label,
        "count": card.count,
        "memory_bytes": card.memory_bytes,
        "total_memory_bytes": card.total_memory_bytes,
        "bandwidth_bytes_per_second": card.bandwidth_bytes_per_second,
        "source": card.source,
    }


AGREEMENT: dict[Family, float] = {"transformer": 0.88, "moe": 0.93, "ssm": 0.93, "hybrid": 0.97}
"""How far the evidence of each rule agrees with itself: controlled training contradicts the transformer's edge in perplexity,
the others' are refined more than contradicted."""

DECISIVE = ("context", "recall", "breadth", "concurrency")
"""Keys whose default, when nobody gave them and another value would change the family, makes the answer less sure."""


def confidence(decision: Decision, contradicted: list[str]) -> tuple[float, list[str]]:
    """How sure the answer is, and what lowered it.

    0.4 when two families tie, up to 0.95 when one is far ahead; less where the evidence does not reach.
    """
    reading, doubts = decision.reading, []
    first, *others = [family for family in decision.order if decision.fits[family]] or [decision.order[0]]
    lead = decision.strength[first] - max((decision.strength[family] for family in others), default=0.0)
    sure = (0.4 + 0.55 * (1.0 - exp(-max(lead, 0.0) / 0.2))) * AGREEMENT[first]
    if lead < 0.1 and others:
        near = max(others, key=lambda family: decision.strength[family])
        doubts.append(f"a near tie: {near} is as good an answer")
    for factor, holds, doubt in (
        (0.8, first == "ssm" and reading.signal <= 0.5, "no pure state space language model above 8B was published"),
        (0.85, reading.signal <= 0.5 and reading.context > HONEST_TOKENS, "nobody measured text at such lengths"),
        (0.8, decision.strength[first] < 0.3, "no rule speaks strongly for any family here"),
        (0.9, reading.card.kind == "described", "the machine is described, not measured"),
        (0.5, bool(decision.distrust[first]), "a veto speaks against the only family that fits"),
        (
            0.7,
            first != decision.findings[0].family,
            f"the strongest rule speaks for {decision.findings[0].family}, which is out",
        ),
    ):
        if holds:
            sure *= factor
            doubts.append(doubt)
    assumed = [key for key in DECISIVE if key in reading.workload.defaulted and turns_on(decision, key)]
    if assumed:
        doubts.append(f"not given: {', '.join(assumed)}")
    sure -= 0.03 * len(assumed) + 0.04 * len(contradicted)
    return round(min(0.95, max(0.05, sure)), 2), doubts


def refusal(decision: Decision, sizes: dict[Family, Sized]) -> tuple[str, float, list[str]]:
    """(one line, bytes per card the smallest useful model needs, nearest workloads that would fit)."""
    least = min(sizes.values(), key=lambda sized: sized.memory.per_card_bytes)
    needs = least.memory.per_card_bytes / (1.0 - decision.ask.margin)
    work, has = decision.reading.workload, decision.reading.hardware.memory_bytes
    nearest = [f"{_rounded_up(needs)} of memory"]
    if (tokens := _tokens_that_fit(decision)) is not None:
        nearest.append(f"{say_tokens(tokens)} tokens")
    if (users := _users_that_fit(decision)) is not None:
        nearest.append(f"{users:,} sequence{'s' * (users > 1)} at once")
    said = (
        f"No family fits: the smallest useful model ({say_count(least.spec.parameters().total)}) needs {say_bytes(needs)} at "
        f"{least.precision} with {say_tokens(work.context)} tokens x {work.concurrency:,}; you gave {say_bytes(has)}. "
        f"Nearest: {', or '.join(nearest)}."
    )
    return said, needs, nearest


def _rounded_up(size: float) -> str:
    """A memory size that surely suffices, in steps of what it is: 3.2 GB, 48 GB."""
    unit = 1e8 if size < 1e10 else 1e9
    return say_bytes(-(-size // unit) * unit)


def _tokens_that_fit(decision: Decision) -> int | None:
    """The longest context, to a power of two, at which some family fits."""
    if not isinstance(decision.reading.workload.context, int):
        return None
    return _largest(decision, "context", decision.reading.workload.context)


def _users_that_fit(decision: Decision) -> int | None:
    return _largest(decision, "concurrency", decision.reading.workload.concurrency)


def _largest(decision: Decision, key: str, value: int) -> int | None:
    while value > 1:
        value //= 2
        if Decision.of(decision.reading.workload.varied(**{key: value})).family is not None:
            return value
    return None
