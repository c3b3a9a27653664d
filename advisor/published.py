"""Open models that exist already: which of them fit this workload on this card. Most users should download, not train."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from archcompass.advisor.catalogue import family
from archcompass.advisor.decide import Decision
from archcompass.advisor.result import Result
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.placement import first_token
from archcompass.advisor.sizing.search import Sized, held_by
from archcompass.advisor.units import say_bytes, say_count
from archcompass.blocks import zoo
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.precision import precision
from archcompass.profiles.predict import predict

WRITTEN = ("text", "code", "logs")
"""Modalities that the published models read."""

LOOKED_AT, NAMED = 8, 5
"""How many of the nearest in size are looked at, and how many of those are named."""


@dataclass(frozen=True, kw_only=True)
class Existing(Result):
    """A published model under this load on this machine.

    Attributes:
        name, family, parameters: which it is.
        precision: the best allowed that fits and is no larger than what was published, or the smallest when none does.
        fits: whether it does, the margin left free.
        made_for: tokens it was made for; None where nobody says.
        memory_bytes: over all cards.
        per_user: tokens per second for each user; None when it does not fit.
        licence, source: of weights and figures.
        why: how it compares with the recommendation.
    """

    name: str
    family: str
    precision: str
    fits: bool
    made_for: int | None
    parameters: dict[str, int]
    memory_bytes: float
    ttft_ms: float | None
    per_user: float | None
    licence: str | None
    source: str
    why: str


def existing(decision: Decision, pick: Sized) -> list[Existing]:
    """Published language models near the pick, the most fitting first; none for signals or training.

    Of those nearest in size that no veto speaks against: the pick's family, models made for the length, then size.
    """
    ask = decision.ask
    if ask.reading.workload.modality not in WRITTEN or ask.kind == "signal" or ask.reading.workload.mode == "training":
        return []
    target = pick.spec.parameters().total
    near = sorted(zoo.names(), key=lambda name: (_far(name, target), name))
    ranked = list(islice((name for name in near if _may_serve(decision, name)), LOOKED_AT))

    def key(name: str) -> tuple[bool, bool, int]:
        spec = zoo.entry(name).spec
        length = spec.max_position_embeddings
        short = length is not None and length < ask.prompt
        return (family(spec) != pick.style.family, short, ranked.index(name))

    found = [_under(ask, name, pick) for name in sorted(ranked, key=key)[:NAMED]]
    return sorted(found, key=lambda one: not one.fits)


def _may_serve(decision: Decision, name: str) -> bool:
    """Whether no veto speaks against its family, and it is no second spelling of another."""
    entry = zoo.entry(name)
    return entry.same_as is None and not decision.distrust[family(entry.spec)]


def _far(name: str, total: int) -> float:
    """How many times a published size is from the pick's; larger ones count double, since they seldom fit."""
    ratio = zoo.figures(name).total / total
    return ratio * 2 if ratio > 1 else 1 / ratio


def _under(ask: Ask, name: str, pick: Sized) -> Existing:
    entry = zoo.entry(name)
    spec = entry.spec
    chosen, *better = _formats(ask, entry.precision)
    held, request = held_by(spec, ask, chosen)
    for each in better:
        wider, how = held_by(spec, ask, each)
        if wider.per_card_bytes <= ask.capacity_bytes:
            chosen, held, request = each, wider, how
    fits = held.per_card_bytes <= ask.capacity_bytes
    load = predict(spec, request, ask.hardware) if fits and ask.serves else None
    step = load.decode_ms_per_token if load else None
    first = predict(spec, first_token(request), ask.hardware) if fits and ask.serves else None
    parameters = spec.parameters()
    return Existing(
        name=name,
        family=family(spec),
        precision=chosen,
        fits=fits,
        made_for=spec.max_position_embeddings,
        parameters={"total": parameters.total, "active": parameters.active},
        memory_bytes=held.total_bytes,
        ttft_ms=first.prefill_ms if first else None,
        per_user=1e3 / step if step else None,
        licence=entry.licence,
        source=entry.source,
        why=_why(ask, spec, held.per_card_bytes, fits, pick),
    )


def _formats(ask: Ask, published: str) -> list[str]:
    """Formats its weights may take, smallest first: none larger than what was published."""
    bits = precision(published).bits
    return list(dict.fromkeys(each if precision(each).bits <= bits else published for each in ask.precisions))


def _why(ask: Ask, spec: ModelSpec, needs: float, fits: bool, pick: Sized) -> str:
    if not fits:
        return f"needs {say_bytes(needs)} of {say_bytes(ask.hardware.memory_bytes)}"
    length = spec.max_position_embeddings
    if length is not None and length < ask.prompt:
        return f"was made for {length:,} tokens"
    kin = "the recommended family" if family(spec) == pick.style.family else "another family"
    return f"{kin}, {say_count(spec.parameters().total)} against {say_count(pick.spec.parameters().total)}"
