"""What a rule says: a family, a strength with its arithmetic, a reason in plain words, and the evidence it stands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from archcompass.advisor.reading import Reading
from archcompass.advisor.sizing.shapes import Family
from archcompass.advisor.units import say_bytes, say_length, say_tokens

RuleName = Literal["maximum-quality", "bottomless-knowledge", "infinite-memory", "hybrids"]


class Evidence(NamedTuple):
    """One published finding.

    Attributes:
        claim: what was found.
        number: the figure.
        source: where.
        grade: A controlled or independent, B published but not controlled, C said by the vendor.
        effect: what it does to the rule.
    """

    claim: str
    number: str
    source: str
    grade: Literal["A", "B", "C"]
    effect: Literal["supports", "refines", "contradicts"]


class Term(NamedTuple):
    """One factor of a strength: what went in, by which function, and what came out."""

    name: str
    input: str
    function: str
    value: float
    source: str = ""


class Finding(NamedTuple):
    """What a rule says of one workload.

    Attributes:
        rule, family: which rule, and the family it speaks for.
        strength: 0 to 1.
        reason: why, with the user's own numbers.
        formula: how the terms make the strength.
        terms: the arithmetic.
        evidence: what it stands on.
    """

    rule: RuleName
    family: Family
    strength: float
    reason: str
    formula: str
    terms: tuple[Term, ...]
    evidence: tuple[Evidence, ...]


class Rule(NamedTuple):
    """A rule: the family it speaks for, how strongly, and why.

    Attributes:
        name, family: which rule, and the family it speaks for.
        strength: 0 to 1; all the engine asks when it looks for what would change the answer.
        explain: the whole finding.
    """

    name: RuleName
    family: Family
    strength: Callable[[Reading], float]
    explain: Callable[[Reading], Finding]


def bounded(product: float) -> float:
    """A strength: within 0 and 1, to four digits, so that equal inputs print equal numbers."""
    return round(min(1.0, max(0.0, product)), 4)


def caches(reading: Reading) -> str:
    """What the caches of all sequences come to, for the arithmetic of a rule."""
    if not reading.keeps_cache:
        return "no cache is kept"
    return (
        f"caches of {say_bytes(reading.cache_bytes)} take {reading.cache_share:.2g} of a token's time to read and "
        f"{reading.held_share:.2g} of half the memory"
    )


def load(reading: Reading) -> str:
    """What is alive at once, for a reason: "64 sequences of 2k tokens read and 16k written"."""
    work = reading.workload
    if not isinstance(work.context, int):
        return say_length(work.context) if work.concurrency == 1 else f"{work.concurrency:,} endless inputs"
    what = say_length(work.context)
    if work.output > work.context:
        what += f" read and {say_tokens(work.output)} written"
    return what if work.concurrency == 1 else f"{work.concurrency:,} sequences of {what}"
