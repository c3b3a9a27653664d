"""The four families side by side at one budget, over a sweep of context or batch, and where they cross.

Each family is sized once, for the workload as given; then the same four models are asked for memory and time along the
sweep. A crossing is where the order of two families turns, found between two neighbouring points on logarithmic axes.

On this machine the same is done with real blocks: the four designs, made small enough for a minute, are built and timed, and
what was measured stands over what was predicted for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from math import exp, log
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from archcompass.advisor.reading import Reading
from archcompass.advisor.recommend import recommend
from archcompass.advisor.sizing.shapes import FAMILIES, Family
from archcompass.advisor.units import say_bytes, say_ms, say_tokens
from archcompass.advisor.workload import Workload
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.predict import Call, Prediction, predict
from archcompass.profiles.request import Request
from archcompass.profiles.tables import efficiency_of

if TYPE_CHECKING:
    from archcompass.profiles.measure.sweep import Seen

Sweep = Literal["context", "batch"]

CONTEXTS = tuple(2**power for power in range(10, 21))
BATCHES = tuple(2**power for power in range(9))

CONTEXTS_HERE = tuple(2**power for power in range(8, 14))
BATCHES_HERE = tuple(2**power for power in range(5))

PARAMETERS_HERE, VOCABULARY_HERE, OUTPUT_HERE = 20_000_000, 4096, 16
"""What is built here: small enough for a minute, large enough that products and attention decide the time."""

METRICS = {
    "memory_bytes": "memory",
    "prefill_ms": "prefill time",
    "decode_ms_per_token": "time per token",
}

PARTS = {
    "attention": "attention",
    "gemm": "matrix products",
    "grouped_gemm": "experts",
    "scan": "recurrence",
    "delta_rule": "recurrence",
    "selective_scan": "recurrence",
    "collective": "messages between cards",
    "launch": "waiting for launches",
}
"""What a time is made of, in words, by the kind of operation; all else is small operations."""


class Point(BaseModel):
    """One family at one place of the sweep; times are None where it does not fit.

    Attributes:
        parts: what each metric is made of, by name; empty where it was measured.
    """

    model_config = ConfigDict(frozen=True)

    context: int
    batch: int
    family: str
    memory_bytes: float
    fits: bool
    prefill_ms: float | None
    decode_ms_per_token: float | None
    source: str
    parts: dict[str, dict[str, float]] = Field(default_factory=dict, exclude=True)


class Crossover(BaseModel):
    """Where two families change places: above `at`, `cheaper` costs less than `dearer`; `cause` is what grew apart there."""

    model_config = ConfigDict(frozen=True)

    metric: str
    at: float
    cheaper: str
    dearer: str
    cause: str


class Comparison(BaseModel):
    """The whole sweep.

    Attributes:
        capacity_bytes: what the cards hold together.
        range: (low, high) factors on every predicted time, for "prefill" and "decode".
        notes: what a reader must know.
        points: predicted.
        measured: the same models timed on this machine, as far as time and memory went; empty unless asked for.
        measured_crossovers: where the measured lines cross.
    """

    model_config = ConfigDict(frozen=True)

    sweep: Sweep
    hardware: str
    capacity_bytes: int
    range: dict[str, tuple[float, float]]
    notes: tuple[str, ...] = ()
    models: dict[str, dict[str, Any]]
    points: tuple[Point, ...]
    crossovers: tuple[Crossover, ...]
    measured: tuple[Point, ...] = ()
    measured_crossovers: tuple[Crossover, ...] = ()


@dataclass(frozen=True, slots=True)
class _Contestant:
    family: Family
    precision: str
    spec: ModelSpec
    runs: Mapping[str, Any] = field(default_factory=dict, hash=False)


def compare(workload: Workload, sweep: Sweep = "context", values: Sequence[int] | None = None) -> Comparison:
    """Sizes the four families for `workload` and asks them along the sweep, always as they run: training has no sweep.

    Raises:
        DoesNotFitError: no family can be sized for the card.
    """
    contestants = _contestants(workload)
    along = values or (CONTEXTS if sweep == "context" else BATCHES)
    return _compared(contestants, workload, sweep, along, Reading.of(workload).hardware)


def compare_here(
    workload: Workload,
    sweep: Sweep = "context",
    values: Sequence[int] | None = None,
    *,
    device: str = "cpu",
    seconds: float = 60.0,
    parameters: int = PARAMETERS_HERE,
    progress: Callable[[float, str], None] | None = None,
) -> Comparison:
    """The four designs for `workload`, each reduced to about `parameters`, predicted and measured on this machine.

    Memory is that of tensors alone, without what the process holds besides.

    Args:
        seconds: about how long measuring may take, shared evenly; longer places are left out.
        parameters: about how many each model keeps.
        progress: told (share done, what is done now).

    Raises:
        DoesNotFitError: no family can be sized for the card.
        InputError: no such device here.
    """
    from archcompass.profiles.measure.here import this_machine
    from archcompass.profiles.measure.sweep import sweep as run
    from archcompass.profiles.training.reduce import reduced

    hardware = this_machine(device)
    small = workload.model_copy(update={"output": OUTPUT_HERE})
    along = sorted(values or (CONTEXTS_HERE if sweep == "context" else BATCHES_HERE))
    found = [
        _Contestant(c.family, "bf16", reduced(c.spec, parameters, VOCABULARY_HERE)) for c in _contestants(workload)
    ]
    measured: list[Point] = []
    for index, one in enumerate(found):

        def told(share: float, text: str, before: int = index, family: str = one.family) -> None:
            if progress is not None:
                progress((before + share) / len(found), f"{family}, {text}")

        asked = [_asked(one, small, sweep, value) for value in along]
        for seen in run(one.spec, asked, hardware, device=device, seconds=seconds / len(found), progress=told):
            measured.append(_seen(one.family, seen))
    lines = _compared(found, small, sweep, along, hardware, overhead=False)
    return lines.model_copy(
        update={"measured": tuple(measured), "measured_crossovers": tuple(_crossovers(measured, sweep))}
    )


def _seen(family: str, seen: Seen) -> Point:
    asked = seen.request
    return Point(
        context=asked.prompt,
        batch=asked.batch,
        family=family,
        memory_bytes=seen.memory_bytes,
        fits=True,
        prefill_ms=seen.prefill.ms,
        decode_ms_per_token=seen.decode.ms if seen.decode else None,
        source="measured",
    )


def _contestants(workload: Workload) -> list[_Contestant]:
    answer, serves = recommend(workload, quick=True), Reading.of(workload).serves
    found = [
        _Contestant(c.family, c.precision, c.model, c.runs if serves else {})
        for c in answer.candidates
        if c.model is not None
    ]
    return sorted(found, key=lambda contestant: FAMILIES.index(contestant.family))


def _compared(
    contestants: Sequence[_Contestant],
    workload: Workload,
    sweep: Sweep,
    along: Sequence[int],
    hardware: Hardware,
    overhead: bool = True,
) -> Comparison:
    points = [_point(one, workload, sweep, value, hardware, overhead) for one in contestants for value in along]
    afterwards = f"sized for {workload.mode}, compared as they run afterwards"
    return Comparison(
        sweep=sweep,
        hardware=hardware.label,
        capacity_bytes=hardware.total_memory_bytes,
        range=dict(efficiency_of(hardware).spread),
        notes=() if workload.mode == "inference" else (afterwards,),
        models={one.family: _facts(one) for one in contestants},
        points=tuple(points),
        crossovers=tuple(_crossovers(points, sweep)),
    )


def _facts(one: _Contestant) -> dict[str, Any]:
    parameters = one.spec.parameters()
    return {"total": parameters.total, "active": parameters.active, "precision": one.precision}


def _asked(one: _Contestant, workload: Workload, sweep: Sweep, value: int) -> Request:
    context = value if sweep == "context" else 16384 if workload.unbounded else int(workload.context)
    batch = workload.concurrency if sweep == "context" else value
    return Request(batch=batch, prompt=context, generate=workload.output, precision=one.precision, **one.runs)


def _point(one: _Contestant, workload: Workload, sweep: Sweep, value: int, hardware: Hardware, overhead: bool) -> Point:
    asked = _asked(one, workload, sweep, value)
    found = predict(one.spec, asked, hardware)
    return Point(
        context=asked.prompt,
        batch=asked.batch,
        family=one.family,
        memory_bytes=found.memory.total_bytes - (0 if overhead else found.memory.overhead_bytes),
        fits=found.fits,
        prefill_ms=found.prefill_ms,
        decode_ms_per_token=found.decode_ms_per_token,
        source=found.source,
        parts=_parts(found),
    )


def _parts(found: Prediction) -> dict[str, dict[str, float]]:
    """What each metric is made of."""
    ledger = found.memory
    held = {"weights": ledger.weights_bytes, "caches and states": ledger.state_bytes}
    held["activations"] = ledger.activation_bytes
    return {"memory_bytes": held, "prefill_ms": _timed(found.prefill), "decode_ms_per_token": _timed(found.decode)}


def _timed(call: Call | None) -> dict[str, float]:
    parts: dict[str, float] = {}
    for part in call.parts if call else ():
        name = PARTS.get(part.kind, "small operations")
        parts[name] = parts.get(name, 0.0) + part.ms
    return parts


def _crossovers(points: Sequence[Point], sweep: Sweep) -> list[Crossover]:
    lines = {family: [point for point in points if point.family == family] for family in FAMILIES}
    found = []
    for metric in METRICS:
        for one, other in combinations([family for family in FAMILIES if lines[family]], 2):
            for (a, b), (c, d) in zip(pairwise(lines[one]), pairwise(lines[other]), strict=False):
                crossing = _crossing(metric, sweep, (a, b), (c, d))
                if crossing is not None:
                    found.append(crossing)
    return sorted(found, key=lambda crossing: (list(METRICS).index(crossing.metric), crossing.at))


def _crossing(metric: str, sweep: Sweep, one: tuple[Point, Point], other: tuple[Point, Point]) -> Crossover | None:
    """Where the first family's line crosses the second's between two places, or None."""
    values = [getattr(point, metric) for point in (*one, *other)]
    if any(value is None or value <= 0 for value in values):
        return None
    before, after = log(values[0] / values[2]), log(values[1] / values[3])
    if before * after >= 0:
        return None
    x0, x1 = log(getattr(one[0], sweep)), log(getattr(one[1], sweep))
    at = exp(x0 + (x1 - x0) * before / (before - after))
    cheaper, dearer = (one, other) if after < 0 else (other, one)
    cause = _cause(metric, sweep, cheaper, dearer)
    return Crossover(metric=metric, at=at, cheaper=cheaper[0].family, dearer=dearer[0].family, cause=cause)


def _cause(metric: str, sweep: Sweep, cheaper: tuple[Point, Point], dearer: tuple[Point, Point]) -> str:
    """The part that grew furthest apart between the two places, and by how much for each."""
    names = {name for point in (*cheaper, *dearer) for name in point.parts.get(metric, ())}
    if not names:
        return "as timed here"

    def grown(pair: tuple[Point, Point], name: str) -> float:
        before, after = (point.parts[metric].get(name, 0.0) for point in pair)
        return after - before

    name = max(sorted(names), key=lambda name: grown(dearer, name) - grown(cheaper, name))
    more, less = (_said(metric, grown(pair, name)) for pair in (dearer, cheaper))
    low, high = (say_tokens(getattr(point, sweep)) for point in dearer)
    return f"{name}: {more} for {dearer[0].family}, {less} for {cheaper[0].family} from {low} to {high}"


def _said(metric: str, change: float) -> str:
    say = say_bytes if metric == "memory_bytes" else say_ms
    return f"{'-' if change < 0 else '+'}{say(abs(change))}"
