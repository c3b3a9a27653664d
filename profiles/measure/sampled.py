"""What no machine here could hold, measured all the same: each distinct block at full size, one at a time, summed by count."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.runtime import BlockState, Context
from archcompass.profiles.efficiency import Efficiency
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.measure import build
from archcompass.profiles.measure.clock import Times, once, repeat, synchronise
from archcompass.profiles.measure.model import Measured, Progress, ran, shortened
from archcompass.profiles.measure.peak import process_peak_bytes, reset_process_peak, tensor_peak_bytes
from archcompass.profiles.predict import Source, predict, sublayer_work, time_of
from archcompass.profiles.request import Request
from archcompass.profiles.tables import efficiency_of


@dataclass(slots=True)
class _Sample:
    """One block's share: how often it stands, its two times, its memory."""

    name: str
    count: int
    prefill: Times
    decode: Times
    peak_bytes: int
    state_bytes: int
    source: Source


def measure_blocks(
    spec: ModelSpec, request: Request, hardware: Hardware, device: torch.device, seconds: float, progress: Progress
) -> Measured:
    """The sum of `spec`'s distinct parts. A part that is too big even alone is predicted, and the source says so."""
    table = efficiency_of(hardware)
    reset_process_peak()
    deadline = time.perf_counter() + seconds
    progress(0.0, "a first look at the machine's pace")
    slower = pace(spec, request, hardware, table, device)
    planned = shorten_parts(spec, request, hardware, table, seconds / slower)
    samples = []
    parts = _parts(spec)
    for index, (name, count) in enumerate(parts):
        progress(index / len(parts), f"{name} (stands {count} times)")
        share = max(0.5, (deadline - time.perf_counter()) / (len(parts) - index))
        samples.append(_sample(spec, name, count, planned, hardware, table, device, share))
        gc.collect()
    progress(1.0, "done")
    order = ("sampled", "calibrated", "roofline")
    prefill = _summed([(s.count, s.prefill) for s in samples])
    decode = _summed([(s.count, s.decode) for s in samples]) if request.generate else None
    foreseen = predict(spec, planned, hardware.with_room_for_all()).memory
    predicted = [s.name for s in samples if s.source != "sampled"]
    notes = (f"too big to be held here, so predicted: {', '.join(predicted)}",) if predicted else ()
    return Measured(
        source=max((s.source for s in samples), key=order.index),
        request=planned,
        parameters=spec.parameters().total,
        weights_bytes=int(foreseen.weights_bytes),
        state_bytes=sum(s.count * s.state_bytes for s in samples),
        spare_bytes=0,
        activation_bytes=max(s.peak_bytes for s in samples),
        process_peak_bytes=process_peak_bytes() if device.type == "cpu" else None,
        prefill=prefill,
        decode=decode,
        ran=ran(device, planned, prefill, decode) | _how_often(samples, planned),
        parts=tuple((s.name, s.source, s.count, s.count * (s.prefill.ms + s.decode.ms)) for s in samples),
        notes=(
            *notes,
            "each distinct block was run alone at full size and summed by count",
            *shortened(request, planned),
        ),
    )


def _summed(parts: Sequence[tuple[int, Times]]) -> Times:
    """All parts together: the sums of their lower quartiles, of their medians and of their upper quartiles."""
    return Times(tuple(sum(count * getattr(times, at) for count, times in parts) for at in ("low", "ms", "high")))


def _how_often(samples: Sequence[_Sample], planned: Request) -> dict[str, int]:
    """What `ran` says of the model as a whole, said of the part that ran least."""
    return {
        "generate": planned.generate,
        "prefill_runs": min(len(s.prefill.runs) for s in samples),
        "decode_runs": min(len(s.decode.runs) for s in samples),
        "outliers": sum(s.prefill.outliers + s.decode.outliers for s in samples),
    }


def shorten_parts(spec: ModelSpec, request: Request, hardware: Hardware, table: Efficiency, seconds: float) -> Request:
    """The longest prompt, by halves, for which every distinct part can run three times in `seconds`."""
    prompt = request.prompt
    while prompt > 64:
        step = replace(request, prompt=prompt).step(min(prompt, replace(request, prompt=prompt).chunk))
        each = sum(time_of(sublayer_work(spec, name, step), table, hardware, 1).ms for name in spec.counts)
        building = sum(spec.blocks[name].parameters(spec.hidden_size).total for name in spec.counts) * 1e-9
        if building + 3e-3 * each < 0.7 * seconds and prompt <= replace(request, prompt=prompt).chunk:
            break
        prompt //= 2
    return replace(request, prompt=max(prompt, 1), generate=min(request.generate, 8))


def pace(spec: ModelSpec, request: Request, hardware: Hardware, table: Efficiency, device: torch.device) -> float:
    """How many times slower than foreseen the smallest block runs a short prompt now; at least 1."""
    name = min(spec.counts, key=lambda block: spec.blocks[block].parameters(spec.hidden_size).total)
    short = replace(request, prompt=min(request.prompt, 64), batch=1)
    with torch.inference_mode():
        prefill, _, _, _ = _block(spec, name, short, device)
        synchronise(device)
        seen = min(once(prefill, device) for _ in range(2))
    return max(1.0, seen / time_of(sublayer_work(spec, name, short.step(short.prompt)), table, hardware, 1).ms)


def _parts(spec: ModelSpec) -> list[tuple[str, int]]:
    return [*spec.counts.items(), ("head", 1)]


def _sample(
    spec: ModelSpec,
    name: str,
    count: int,
    request: Request,
    hardware: Hardware,
    table: Efficiency,
    device: torch.device,
    seconds: float,
) -> _Sample:
    elements = spec.head.vocab_size * spec.hidden_size if name == "head" else (
        spec.blocks[name].parameters(spec.hidden_size).total
    )  # fmt: skip
    element_bytes = 4 if request.activations == "fp32" else 2
    if elements * element_bytes > 0.5 * build.available_bytes(device):
        return _foreseen(spec, name, count, request, hardware, table)
    with torch.inference_mode():
        prefill, step, peak, state_bytes = (
            _head(spec, request, device) if name == "head" else _block(spec, name, request, device)
        )
        runs = repeat(prefill, device, seconds=0.4 * seconds, least=1, most=7, warmups=0)
        steps = repeat(step, device, seconds=0.15 * seconds, least=3, most=20)
    return _Sample(name, count, runs, steps, peak, state_bytes, "sampled")


def _foreseen(
    spec: ModelSpec, name: str, count: int, request: Request, hardware: Hardware, table: Efficiency
) -> _Sample:
    steps = [request.step(request.prompt), request.decode_step()]
    works = [sublayer_work(spec, name, step) for step in steps]
    prefill, decode = (time_of(work, table, hardware, 1).ms for work in works)
    source: Source = "calibrated" if table.source == "calibrated" else "roofline"
    return _Sample(name, count, Times((prefill,)), Times((decode,)), 0, 0, source)


_Runs = tuple[Callable[[], object], Callable[[], object], int, int]


def _block(spec: ModelSpec, name: str, request: Request, device: torch.device) -> _Runs:
    dtype = build.dtype_of(request)
    layer = build.sublayer(spec, name, device, dtype)
    x = torch.randn(request.batch, request.prompt, spec.hidden_size, device=device).to(dtype)

    def prefill() -> tuple[torch.Tensor, BlockState | None]:
        out: tuple[torch.Tensor, BlockState | None] = layer(x, None, Context(embeddings=x))
        return out

    kept: list[tuple[torch.Tensor, BlockState | None]] = []
    peak, left = tensor_peak_bytes(lambda: kept.append(prefill()), device)
    state = kept.pop()[1]
    state_bytes = state.nbytes if state is not None else 0
    one = x[:, -1:].contiguous()
    past = [request.prompt]

    def step() -> object:
        out = layer(one, state, Context(past=past[0], embeddings=one))
        past[0] += 1
        return out

    return prefill, step, peak - left + x.nbytes, state_bytes


def _head(spec: ModelSpec, request: Request, device: torch.device) -> _Runs:
    """The head over the last position, the final norm before it; tied or not, its product is one and the same."""
    dtype = build.dtype_of(request)
    weight = torch.empty(spec.vocab_size, spec.hidden_size, device=device, dtype=dtype).uniform_(-0.02, 0.02)
    norm = build.block(spec.norm, spec.hidden_size, device, dtype) if spec.norm is not None else None
    x = torch.randn(request.batch, 1, spec.hidden_size, device=device).to(dtype)

    def call() -> object:
        h = x if norm is None else norm(x)[0]
        return torch.nn.functional.linear(h, weight)

    peak, _ = tensor_peak_bytes(call, device)
    return call, call, peak, 0
