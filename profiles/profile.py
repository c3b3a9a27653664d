"""One model on one machine: predicted for any card, measured where we run, side by side with their ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import InputError
from archcompass.profiles import check
from archcompass.profiles.hardware import Hardware, describe, find, with_memory
from archcompass.profiles.inverse import Limits, limits
from archcompass.profiles.ledger import Memory
from archcompass.profiles.predict import Call, Prediction, predict
from archcompass.profiles.request import Engine, Mode, Optimizer, Parallel, Recompute, Request, usual_parallel
from archcompass.profiles.units import parse_bandwidth, parse_bytes, parse_flops

if TYPE_CHECKING:
    from archcompass.profiles.measure.model import Measured

Device = Literal["cpu", "cuda"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterCounts(_Data):
    """Learned numbers. Active ones are those one token's products touch."""

    total: int
    active: int
    active_without_embeddings: int


class MemoryBytes(_Data):
    """Bytes over all cards; `total_bytes` is their sum."""

    weights_bytes: int
    state_bytes: int
    activation_bytes: int
    overhead_bytes: int
    training_bytes: int = 0
    total_bytes: int
    per_card_bytes: int
    capacity_bytes: int
    detail: dict[str, int] = {}


class PrefillSpeed(_Data):
    """The whole prompt of the whole batch (in training, one step)."""

    ms: float
    tokens_per_second: float
    flops: float


class DecodeSpeed(_Data):
    """One step at the average context; `tokens_per_second` is the whole batch's, the other one user's."""

    ms_per_token: float
    tokens_per_second: float
    tokens_per_second_per_user: float


class Range(_Data):
    """Where the truth should lie: [low, high]."""

    prefill_ms: tuple[float, float] | None = None
    decode_ms_per_token: tuple[float, float] | None = None
    why: str


class PartMs(_Data):
    """Share of one operation."""

    name: str
    kind: str
    count: int
    ms: float
    bound: str


class ProfileEntry(_Data):
    """What one source says.

    Attributes:
        source: measured, sampled, calibrated or roofline.
        hardware: the machine it speaks of.
        precision, prompt, generate: what it speaks of; a measurement may be shorter than what was asked.
        ratio: this measurement divided by the prediction for the very same run, by phase.
        ran: what was run, on what, how often.
    """

    source: Literal["measured", "sampled", "calibrated", "roofline"]
    hardware: str
    precision: str
    prompt: int
    generate: int
    memory: MemoryBytes
    prefill: PrefillSpeed | None
    decode: DecodeSpeed | None
    range: Range
    fits: bool
    verdict: str = ""
    process_peak_bytes: int | None = None
    ratio: dict[str, float] = {}
    ran: dict[str, Any] = {}
    breakdown: dict[str, list[PartMs]] = {}
    notes: list[str] = []


class ProfileReport(_Data):
    """One question, and an entry per source that answers it; `unchecked` is what its `check` does not measure."""

    model: str
    parameters: ParameterCounts
    hardware: str
    precision: str
    kv_precision: str
    mode: str
    engine: str
    batch: int
    prompt: int
    generate: int
    profiles: list[ProfileEntry]
    limits: Limits
    check: str
    unchecked: list[str]

    @property
    def fits(self) -> bool:
        """Whether the first entry, which answers the question as asked, fits."""
        return self.profiles[0].fits


def profile(
    spec: ModelSpec,
    *,
    gpu: str | Hardware | None = None,
    vram: str | float | None = None,
    bandwidth: str | float | None = None,
    tflops: str | float | None = None,
    device: Device | str | None = None,
    batch: int = 1,
    prompt: int = 1024,
    generate: int = 256,
    precision: str = "bf16",
    kv_precision: str | None = None,
    mode: Mode = "inference",
    engine: Engine = "native",
    parallel: Parallel | None = None,
    offload: float = 0.0,
    ram_bytes_per_second: float = 80e9,
    optimizer: Optimizer = "adamw",
    master_weights: bool = False,
    recompute: Recompute = "none",
    seconds: float = check.SECONDS,
    progress: Callable[[float, str], None] | None = None,
    called: str | None = None,
) -> ProfileReport:
    """Memory and speed of `spec`.

    Args:
        gpu: a card to predict for, as people write it, or "cpu"; without it and without `device`, this machine.
        vram, bandwidth, tflops: override the card's memory, or describe a card by hand when all three are given.
        device: measure on "cpu" or "cuda" here; the prediction for this machine stands beside it.
        batch, prompt, generate, precision, kv_precision, mode, engine: see `Request`.
        parallel, offload, ram_bytes_per_second: how the model lies on the machine; see `Request`. None shares it as is usual
            (`usual_parallel`).
        optimizer, master_weights, recompute: how it trains there; see `Request`. What is measured trains with their defaults.
        seconds: about how long measuring may take.
        progress: told (share done, what is done now).
        called: what the command line would call this model, a path perhaps; None takes its name.

    Raises:
        InputError: an impossible number, or a device this machine lacks.
        UnknownNameError: a card, precision, mode or engine nobody has heard of.
        MeasurementError: a block that cannot run here.
    """
    request = Request(
        batch=batch, prompt=prompt, generate=generate, mode=mode, precision=precision,
        kv_precision=kv_precision, engine=engine,
    )  # fmt: skip
    named = any(flag is not None for flag in (gpu, vram, bandwidth, tflops))
    target = machine(gpu, vram=vram, bandwidth=bandwidth, tflops=tflops) if named else None
    lies = replace(
        request, parallel=parallel or usual_parallel(mode, engine), offload=offload,
        ram_bytes_per_second=ram_bytes_per_second, optimizer=optimizer, master_weights=master_weights, recompute=recompute,
    )  # fmt: skip
    here = None if device is None else _machine_here(device)
    asked_of = target or here or find("cpu")
    entries = [] if asked_of is here else [entry_of(lies, asked_of, predict(spec, lies, asked_of))]
    if device is not None and here is not None:
        entries += _side_by_side(spec, request, here, device, seconds, progress)
    counts = spec.parameters()
    return ProfileReport(
        model=spec.name,
        parameters=ParameterCounts(
            total=counts.total, active=counts.active, active_without_embeddings=counts.active_without_embeddings
        ),
        hardware=asked_of.tag,
        precision=request.precision,
        kv_precision=request.cache_precision.name,
        mode=request.mode,
        engine=request.engine,
        batch=batch,
        prompt=prompt,
        generate=generate,
        profiles=entries,
        limits=limits(spec, lies, asked_of),
        check=check.command(called or spec.name, lies, target),
        unchecked=check.unchecked(spec, lies, target),
    )


def machine(
    gpu: str | Hardware | None,
    *,
    vram: str | float | None = None,
    bandwidth: str | float | None = None,
    tflops: str | float | None = None,
) -> Hardware:
    """The machine that these flags mean: a card by name, where they leave it as it is sold, or one described by hand.

    `tflops` moves the rates of all dtypes alike.

    Raises:
        InputError: too little to describe a card by.
        UnknownNameError: no such card.
    """
    if gpu is None:
        if vram is None or bandwidth is None or tflops is None:
            raise InputError(
                "gpu is missing: name a card, or give vram, bandwidth and tflops of one that is in no table"
            )
        return describe(vram=vram, bandwidth=bandwidth, tflops=tflops)
    found = gpu if isinstance(gpu, Hardware) else find(gpu)
    if vram is not None:
        found = with_memory(found, parse_bytes(vram, "vram"))
    if bandwidth is not None:
        found = replace(found, bandwidth_bytes_per_second=parse_bandwidth(bandwidth))
    if tflops is not None:
        change = parse_flops(tflops) / found.rate("bf16")
        found = replace(found, flops={dtype: rate * change for dtype, rate in found.flops.items()})
    return found


def entry_of(request: Request, hardware: Hardware, prediction: Prediction) -> ProfileEntry:
    """A prediction as an entry of the report."""
    low, high = prediction.low, prediction.high
    prefill, decode = prediction.prefill_ms, prediction.decode_ms_per_token
    return ProfileEntry(
        source=prediction.source,
        hardware=hardware.tag,
        precision=request.precision,
        prompt=request.prompt,
        generate=request.generate,
        memory=_bytes(prediction.memory),
        prefill=_prefill(prefill, request, prediction.prefill_flops),
        decode=_decode(decode, request),
        range=Range(
            prefill_ms=(prefill * low["prefill"], prefill * high["prefill"]) if prefill is not None else None,
            decode_ms_per_token=(decode * low["decode"], decode * high["decode"]) if decode is not None else None,
            why=_why(prediction),
        ),
        fits=prediction.fits,
        verdict=prediction.verdict,
        breakdown={
            phase: _parts(call)
            for phase, call in (("prefill", prediction.prefill), ("decode", prediction.decode))
            if call
        },
        notes=list(prediction.notes),
    )


def _machine_here(device: str) -> Hardware:
    from archcompass.profiles.measure.here import this_machine

    return this_machine(device)


def _side_by_side(
    spec: ModelSpec,
    request: Request,
    here: Hardware,
    device: str,
    seconds: float,
    progress: Callable[[float, str], None] | None,
) -> list[ProfileEntry]:
    """The prediction for what was really run here, and the run; since it ran, it fits, whatever the ledger says."""
    from archcompass.profiles.measure.model import measure, silent

    measured = measure(spec, request, here, device=device, seconds=seconds, progress=progress or silent)
    foreseen = predict(spec, measured.request, here.with_room_for_all())
    foreseen = replace(foreseen, memory=replace(foreseen.memory, capacity_bytes=float(here.memory_bytes)))
    return [entry_of(measured.request, here, foreseen), _seen(measured, here, foreseen)]


def _seen(measured: Measured, here: Hardware, foreseen: Prediction) -> ProfileEntry:
    """A measurement as an entry, with its ratio to the prediction for the same run."""
    run, prefill, decode = measured.request, measured.prefill, measured.decode
    pairs = {"prefill": (prefill, foreseen.prefill_ms), "decode": (decode, foreseen.decode_ms_per_token)}
    parts = [PartMs(name=name, kind=kind, count=count, ms=ms, bound="") for name, kind, count, ms in measured.parts]
    return ProfileEntry(
        source=measured.source,
        hardware=here.tag,
        precision=run.precision,
        prompt=run.prompt,
        generate=run.generate,
        memory=_seen_bytes(measured, here),
        prefill=_prefill(prefill.ms if prefill else None, run, foreseen.prefill_flops),
        decode=_decode(decode.ms if decode else None, run),
        range=Range(
            prefill_ms=(prefill.low, prefill.high) if prefill else None,
            decode_ms_per_token=(decode.low, decode.high) if decode else None,
            why="lower and upper quartile of the runs",
        ),
        fits=True,
        process_peak_bytes=measured.process_peak_bytes,
        ratio={phase: round(took.ms / ms, 4) for phase, (took, ms) in pairs.items() if took and ms},
        ran=measured.ran,
        breakdown={"sampled": parts} if parts else {},
        notes=list(measured.notes),
    )


def _prefill(ms: float | None, request: Request, flops: float) -> PrefillSpeed | None:
    if ms is None:
        return None
    return PrefillSpeed(ms=ms, tokens_per_second=request.batch * request.prompt / ms * 1e3, flops=flops)


def _decode(ms: float | None, request: Request) -> DecodeSpeed | None:
    if ms is None:
        return None
    return DecodeSpeed(ms_per_token=ms, tokens_per_second=request.batch / ms * 1e3, tokens_per_second_per_user=1e3 / ms)


def _bytes(ledger: Memory) -> MemoryBytes:
    return MemoryBytes(
        weights_bytes=round(ledger.weights_bytes),
        state_bytes=round(ledger.state_bytes),
        activation_bytes=round(ledger.activation_bytes),
        overhead_bytes=round(ledger.overhead_bytes),
        training_bytes=round(ledger.training_bytes),
        total_bytes=round(ledger.weights_bytes) + round(ledger.state_bytes) + round(ledger.activation_bytes)
        + round(ledger.overhead_bytes) + round(ledger.training_bytes),
        per_card_bytes=round(ledger.per_card_bytes),
        capacity_bytes=round(ledger.capacity_bytes),
        detail={name: round(size) for name, size in ledger.detail.items()},
    )  # fmt: skip


def _seen_bytes(measured: Measured, here: Hardware) -> MemoryBytes:
    """Tensors as they were, and as overhead what the process held beyond them."""
    tensors = measured.weights_bytes + measured.state_bytes + measured.activation_bytes
    peak = measured.process_peak_bytes or 0
    overhead = max(peak - tensors, measured.spare_bytes) if measured.source == "measured" else measured.spare_bytes
    return MemoryBytes(
        weights_bytes=measured.weights_bytes,
        state_bytes=measured.state_bytes,
        activation_bytes=measured.activation_bytes,
        overhead_bytes=overhead,
        total_bytes=tensors + overhead,
        per_card_bytes=tensors + overhead,
        capacity_bytes=here.memory_bytes,
        detail={"spare room of caches": measured.spare_bytes},
    )


def _parts(call: Call) -> list[PartMs]:
    ordered = sorted(call.parts, key=lambda part: -part.ms)
    return [PartMs(name=p.name, kind=p.kind, count=p.count, ms=p.ms, bound=p.bound) for p in ordered if p.ms > 0]


def _why(prediction: Prediction) -> str:
    if prediction.source == "calibrated":
        return f"{prediction.basis}: eight of ten measured times lie in it"
    return f"{prediction.basis}; nothing was measured on this machine"
