"""A family sized for the workload, as plain data: memory, speed, why, price, and what one more of everything would cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from archcompass.advisor.decide import Decision, Veto
from archcompass.advisor.result import Result
from archcompass.advisor.sizing.adapters import training_days, training_tokens
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.search import Sized
from archcompass.advisor.sizing.shapes import Family, dense_equivalent
from archcompass.advisor.units import say_bytes, say_count
from archcompass.blocks.base import Block, Step
from archcompass.blocks.model.spec import ModelSpec, block_names
from archcompass.blocks.precision import precision

PRICES: dict[Family, tuple[str, ...]] = {
    "transformer": (
        "the time of a prompt grows with its square",
        "the cache grows with every token of every user",
    ),
    "moe": (
        "every expert lies in memory, used or not",
        "training must balance the load of the experts, and reaches half of a dense model's share of the hardware",
        "a few users at once already touch most experts, so the gain in speed shrinks",
    ),
    "ssm": (
        "young tools: kernels, quantisation and prefix caching are patchy",
        "weak at exact recall: what is not in the state is gone",
    ),
    "hybrid": (
        "two kinds of layers to serve, quantise and debug",
        "prefix caching of recurrent state is young in serving engines",
    ),
}


RUNS = ("kv_precision", "parallel", "offload", "ram_bytes_per_second", "recompute")
"""Fields of a `Request` that sizing decides: how the model lies on the machine, and how it is trained there."""


@dataclass(frozen=True, kw_only=True)
class Marginal(Result):
    """What one more of something would cost, all else equal."""

    what: str
    memory_bytes: float
    decode_percent: float | None


@dataclass(frozen=True, kw_only=True)
class Candidate(Result):
    """One family, sized.

    Attributes:
        family, rank, fits, precision, parameters, memory, speed, why, price, model: DESIGN's keys.
        name: short, as models are named: "31B-A3.4B".
        experts: whether its channel mixers are experts.
        strength: of its rule.
        vetoes: names of what speaks against it however well it fits.
        misses: time limits of the user's that it does not meet, and by what factor.
        bound: what stopped it from being larger: memory, time, need, ladder, or stopgap for what stands in for a better family.
        quality: dense-equivalent parameters, sqrt(total · active), and where the proxy comes from.
        shape: depth, width and the decisions of its style.
        marginal: what one more layer, expert or user would cost.
        runs: the fields of a `Request` that say how it lies on the machine.
        split: how it lies on several cards; None on one.
        training: tokens and days when it is trained; None otherwise.
    """

    family: Family
    rank: int
    fits: bool
    precision: str
    parameters: dict[str, int]
    memory: dict[str, Any]
    speed: dict[str, Any]
    why: list[str]
    price: list[str]
    model: ModelSpec
    name: str
    experts: bool
    strength: float
    vetoes: list[str]
    misses: dict[str, float]
    bound: str
    quality: dict[str, Any]
    shape: dict[str, Any]
    marginal: list[Marginal]
    runs: dict[str, Any]
    split: dict[str, Any] | None
    training: dict[str, float] | None


def candidate(decision: Decision, family: Family, rank: int, sized: Sized) -> Candidate:
    """The candidate of one family."""
    ask, parameters = decision.ask, sized.spec.parameters()
    mine = [veto for veto in decision.vetoes if veto.family == family]
    name, quality = short_name(sized.spec), dense_equivalent(sized.spec)
    return Candidate(
        family=family,
        rank=rank,
        fits=sized.fits,
        precision=sized.precision,
        parameters={"total": parameters.total, "active": parameters.active},
        memory=memory_of(sized, ask),
        speed=speed_of(sized, ask),
        why=why(decision, family, sized, mine),
        price=list(PRICES[family]),
        model=sized.spec.model_copy(update={"name": f"{family}-{name.lower()}"}),
        name=name,
        experts=bool(sized.style.experts),
        strength=decision.strength[family],
        vetoes=[veto.name for veto in mine],
        misses={name: round(factor, 3) for name, factor in sized.misses.items() if ask.is_users_own(name)},
        bound=sized.bound,
        quality={
            "dense_equivalent_parameters": quality,
            "low": quality / 1.6,
            "high": quality * 1.6,
            "knowledge_parameters": parameters.total,
            "source": "sqrt(total · active), good to a factor of 1.6; facts follow the total (arXiv 2410.19034)",
        },
        shape=shape_of(sized),
        marginal=list(marginals(sized, ask)) if sized.fits and ask.serves else [],
        runs={name: getattr(sized.request, name) for name in RUNS},
        split=split_of(sized, ask),
        training=None
        if ask.reading.workload.mode == "inference"
        else {"tokens": training_tokens(sized.spec, ask), "days": training_days(sized.spec, ask)},
    )


def short_name(spec: ModelSpec) -> str:
    """As models are named: "8B", "31B-A3.4B"."""
    parameters = spec.parameters()
    sparse = parameters.idle > 0
    return say_count(parameters.total) + (f"-A{say_count(parameters.active)}" if sparse else "")


def memory_of(sized: Sized, ask: Ask) -> dict[str, Any]:
    """The ledger, over all cards, with what each card has left."""
    held = sized.memory
    return {
        "weights_bytes": held.weights_bytes,
        "state_bytes": held.state_bytes,
        "activation_bytes": held.activation_bytes,
        "training_bytes": held.training_bytes,
        "overhead_bytes": held.overhead_bytes,
        "system_bytes": held.system_bytes,
        "total_bytes": held.total_bytes,
        "per_card_bytes": held.per_card_bytes,
        "capacity_bytes": held.capacity_bytes,
        "left_bytes": held.margin_bytes,
        "reserved_share": ask.margin,
        "notes": list(held.notes),
    }


def speed_of(sized: Sized, ask: Ask) -> dict[str, Any]:
    """Times with their range and source; None for what cannot run."""
    asked = {"prompt": ask.prompt, "batch": ask.reading.workload.concurrency}
    if sized.times is None:
        times = ("ttft_ms", "prefill_ms", "decode_ms_per_token", "tokens_per_second", "per_user")
        return dict.fromkeys(times) | {"source": "roofline", "range": {}} | asked
    load, first = sized.times.load, sized.times.first_token or sized.times.load
    step = load.decode_ms_per_token
    return {
        "ttft_ms": first.prefill_ms,
        "prefill_ms": load.prefill_ms,
        "decode_ms_per_token": step,
        "tokens_per_second": load.tokens_per_second,
        "per_user": 1e3 / step if step else None,
        "source": load.source,
        "range": {
            name: {"low": load.low[name], "high": load.high[name]} for name in ("prefill", "decode") if name in load.low
        },
    } | asked


def why(decision: Decision, family: Family, sized: Sized, vetoes: list[Veto]) -> list[str]:
    """Reasons for and against, the rule's first."""
    finding = next(finding for finding in decision.findings if finding.family == family)
    said = [finding.reason, *(f"vetoed ({veto.name}): {veto.reason}" for veto in vetoes)]
    if not sized.fits:
        return [
            *said,
            f"even {short_name(sized.spec)} needs {say_bytes(sized.memory.per_card_bytes)} of {decision.ask.memory_said}",
        ]
    stopped = {
        "memory": f"the memory holds no larger one with {decision.ask.margin:.0%} left free and room for half as many "
        "sequences again",
        "time": _too_slow(decision.ask),
        "need": "a larger one would bring this task little",
        "ladder": "no larger shape was considered",
        "stopgap": "it only stands in for a family that does not fit; with more memory that one is the answer",
    }[sized.bound]
    return [*said, *_late(decision.ask, sized), stopped]


def _too_slow(ask: Ask) -> str:
    if not ask.serves:
        return "a larger one would train too long"
    asked = any(ask.asked(key) for key in ("tokens_per_second", "ttft_ms"))
    return f"a larger one would be {'too slow for what was asked' if asked else 'slower than people like to wait'}"


def _late(ask: Ask, sized: Sized) -> Iterator[str]:
    """Limits it does not meet, and the pace where that is what stopped it."""
    pace = _pace(ask, sized)
    for name, factor in sized.misses.items():
        limit = {"ttft_ms": "first token", "step_ms": "token"}[name]
        if ask.is_users_own(name) or name != "step_ms" or pace is None:
            measure = "asked" if ask.is_users_own(name) else "is comfortable"
            yield f"takes {factor:.2g} times as long per {limit} as {measure}"
    if pace is not None and ("step_ms" in sized.misses or sized.bound == "time"):
        yield pace


def _pace(ask: Ask, sized: Sized) -> str | None:
    """What each user sees while the others' prompts are read, where those take a good part of the time."""
    if sized.times is None:
        return None
    paced, step = sized.times.paced_ms(ask), sized.times.step_ms
    if paced is None or step is None or paced < 1.1 * step:
        return None
    return f"each user sees {1e3 / paced:.2g} tokens/s while the others' prompts are read"


def shape_of(sized: Sized) -> dict[str, Any]:
    """What was decided about its shape."""
    style = sized.style
    return {
        "layers": sized.spec.num_hidden_layers,
        "width": sized.shape.width,
        "vocabulary": sized.spec.vocab_size,
        "attention_share": 1 / style.period if style.period else (0.0 if style.family == "ssm" else 1.0),
        "window": style.window,
        "full_attention_every": style.full_every or None,
        "experts": style.experts or None,
        "experts_per_token": style.chosen or None,
    }


def marginals(sized: Sized, ask: Ask) -> Iterator[Marginal]:
    """The price of one more attention layer, of sixteen more experts, of one more user."""
    spec, request = sized.spec, ask.request(sized.precision)
    step = request.step(1, max(request.context - 1, 0))
    moved = _moved(spec, step)
    for name in block_names(spec, "mixer"):
        block = spec.blocks[name]
        if block.traits.exact_recall or block.traits.window:
            kind = "attention" if block.traits.exact_recall else "windowed attention"
            held = block.parameters(spec.hidden_size).bytes(request.weight_precision) + _state(block, spec, step)
            extra = sum(op.bytes * op.count for op in block.work(spec.hidden_size, step))
            yield Marginal(what=f"one more {kind} layer", memory_bytes=held, decode_percent=100 * extra / moved)
    for name in block_names(spec, "channel"):
        parameters = spec.blocks[name].parameters(spec.hidden_size)
        if parameters.idle and sized.style.experts:
            each = parameters.idle / (sized.style.experts - sized.style.chosen) * spec.counts[name]
            yield Marginal(
                what="sixteen more experts in every layer",
                memory_bytes=precision(sized.precision).bytes(16 * each),
                decode_percent=None,
            )
    yield Marginal(
        what="one more user", memory_bytes=spec.state_bytes(step), decode_percent=100 * spec.state_bytes(step) / moved
    )


def _state(block: Block, spec: ModelSpec, step: Step) -> float:
    return step.batch * sum(tensor.bytes(step) for tensor in block.state(spec.hidden_size, step.context))


def _moved(spec: ModelSpec, step: Step) -> float:
    """Bytes that one token's step moves."""
    return sum(op.bytes * op.count for op in spec.work(step))


def split_of(sized: Sized, ask: Ask) -> dict[str, Any] | None:
    """How the model lies on several cards, and what the links cost."""
    cards = ask.hardware.count
    if cards == 1:
        return None
    found: dict[str, Any] = {
        "cards": cards,
        "how": _shared_out(sized, cards, serves=ask.serves),
        "per_card_bytes": sized.memory.per_card_bytes,
        "left_bytes": sized.memory.margin_bytes,
        "link_bytes_per_second": ask.hardware.link_bytes_per_second,
        "link_ms_per_token": None,
        "link_share": None,
    }
    decode = sized.times.load.decode if sized.times else None
    if decode is not None:
        link = sum(part.ms for part in decode.parts if part.kind == "collective")
        found |= {"link_ms_per_token": link, "link_share": link / decode.ms}
    return found


def _shared_out(sized: Sized, cards: int, *, serves: bool) -> str:
    """In words, how several cards share the model."""
    style = sized.style
    experts = f"{max(1, style.experts // cards)} of {style.experts} experts on each" if style.experts else ""
    if not serves:
        return f"sequences and weights shared out among {cards} cards (fully sharded, which other tools than ours do)"
    if sized.request.parallel == "tensor":
        return f"tensor parallel over {cards} cards" + (f", {experts}" if experts else "")
    beside = f"experts shared out, {experts}; all else" if experts else "the whole model"
    return f"data parallel over {cards} cards: each serves its own sequences; {beside} copied to every card"
