"""A whole model measured on this machine: prefill, decode, memory, and what was run to know it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from archcompass.blocks.model.module import LanguageModel, Output
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import MeasurementError
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.measure import build, heap
from archcompass.profiles.measure.clock import Times, once, processor_clock, repeat, synchronise
from archcompass.profiles.measure.peak import process_peak_bytes, reset_process_peak, tensor_peak_bytes
from archcompass.profiles.predict import Source, predict
from archcompass.profiles.request import Request

Progress = Callable[[float, str], None]
"""Told how far a measurement is (0 to 1) and what it does now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was seen on this machine.

    Attributes:
        source: "measured" for the whole model, "sampled" for the sum of its blocks, or worse when a block could not run.
        request: what was really run, which may be shorter than what was asked.
        parameters: counted on the built modules.
        weights_bytes, state_bytes: of real tensors, all sequences.
        spare_bytes: room that caches keep for tokens to come.
        activation_bytes: the most alive in one call beside weights and state.
        process_peak_bytes: high-water mark of the process, or of the device's allocator; None where nobody says.
        prefill: the whole prompt (in training: one step), None when the time did not suffice.
        decode: one step at the average context.
        ran: device, threads, versions, repeats.
        parts: (name, count, ms) of a sampled prefill and decode.
        notes: what a reader must know.
    """

    source: Source
    request: Request
    parameters: int
    weights_bytes: int
    state_bytes: int
    spare_bytes: int
    activation_bytes: int
    process_peak_bytes: int | None
    prefill: Times | None
    decode: Times | None
    ran: dict[str, Any] = field(hash=False)
    parts: tuple[tuple[str, str, int, float], ...] = ()
    notes: tuple[str, ...] = ()


def silent(_share: float, _text: str) -> None:
    """Progress that nobody watches."""


@heap.held()
def measure(
    spec: ModelSpec,
    request: Request,
    hardware: Hardware,
    *,
    device: str = "cpu",
    seconds: float = 45.0,
    progress: Progress = silent,
) -> Measured:
    """Builds the model here and times it; what is too big for the machine or the time is measured block by block.

    Args:
        hardware: this machine, to foresee how long things take.
        device: "cpu" or "cuda".
        seconds: about how long it may take; prompt and generated tokens are shortened to keep it.
        progress: told how far it is.

    Raises:
        InputError: no such device.
        MeasurementError: a block that cannot run here.
    """
    from archcompass.profiles.measure.sampled import measure_blocks

    place = build.device_of(device)
    native = native_request(request)
    planned = shorten(spec, native, hardware, seconds)
    if request.training and (planned is None or not _room(spec, planned, hardware, place)):
        raise MeasurementError(
            f"a training step of {spec.name} is too much for this machine; a prediction needs no --device"
        )
    try:
        if planned is None or not _room(spec, planned, hardware, place):
            return measure_blocks(spec, native, hardware, place, seconds, progress)
        return _whole(spec, planned, place, seconds, progress, asked=request)
    except (RuntimeError, MemoryError) as error:
        raise MeasurementError(f"{spec.name} could not be measured on {device}: {error}") from error


def native_request(request: Request) -> Request:
    """The same question for the native blocks, which compute in the activations' dtype and cache in it."""
    return replace(request, precision=request.activations, kv_precision=None, engine="native")


def shorten(spec: ModelSpec, request: Request, hardware: Hardware, seconds: float) -> Request | None:
    """The longest prompt and generation, by halves, that should end in `seconds`; None when not even 64 tokens do (a
    training step is tried with sixteen)."""
    roomy = hardware.with_room_for_all()
    prompt = request.prompt
    while prompt > 16:
        tried = replace(request, prompt=prompt)
        foreseen = predict(spec, tried, roomy)
        building = 2e-10 * spec.parameters().total * 4
        if building + 3.5e-3 * (foreseen.prefill_ms or 0.0) < 0.6 * seconds:
            each = foreseen.decode_ms_per_token or 1.0
            steps = max(4, int(0.25 * seconds * 1e3 / each))
            if 4e-3 * each > 0.4 * seconds:
                return None
            return replace(tried, generate=min(request.generate, steps, 64))
        if prompt <= 64 and not request.training:
            return None
        prompt //= 2
    return replace(request, prompt=prompt, generate=min(request.generate, 8))


def _room(spec: ModelSpec, request: Request, hardware: Hardware, device: torch.device) -> bool:
    """Whether the model takes no more than six tenths of what is free."""
    foreseen = predict(spec, request, hardware.with_room_for_all()).memory
    return foreseen.total_bytes < 0.6 * build.available_bytes(device)


def _whole(
    spec: ModelSpec, request: Request, device: torch.device, seconds: float, progress: Progress, asked: Request
) -> Measured:
    deadline = time.perf_counter() + seconds
    reset_process_peak()
    progress(0.0, f"building {spec.name}")
    model = build.model(spec, device, build.dtype_of(request), request.training)
    ids = _tokens(spec, request, device)
    if not request.training:
        request = _at_this_pace(model, ids, request, device, deadline - time.perf_counter())
        ids = ids[:, : request.prompt]
    if request.training:
        return _training(spec, model, request, device, deadline, progress)
    with torch.inference_mode():
        progress(0.15, f"prefill of {request.prompt} tokens")
        outputs: list[Output] = []
        peak, left = tensor_peak_bytes(lambda: outputs.append(prefill(model, ids, request)), device)
        remaining = 0.6 * (deadline - time.perf_counter())
        again = repeat(lambda: prefill(model, ids, request), device, seconds=remaining, least=1, most=9, warmups=0)
        progress(0.7, f"decode of {request.generate} tokens")
        state_bytes = outputs[0].state.nbytes if outputs[0].state else 0
        steps = decode(model, outputs[0], request, device, deadline)
    progress(1.0, "done")
    return Measured(
        source="measured",
        request=replace(request, generate=len(steps.runs) if steps else 0),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        state_bytes=state_bytes,
        spare_bytes=max(0, left - state_bytes - _logits_bytes(outputs[0])),
        activation_bytes=peak - left,
        process_peak_bytes=_process_peak(device),
        prefill=again,
        decode=steps,
        ran=ran(device, request, again, steps),
        notes=shortened(asked, request),
    )


def _at_this_pace(
    model: LanguageModel, ids: torch.Tensor, request: Request, device: torch.device, seconds: float
) -> Request:
    """A shorter prompt if a piece of it shows that the machine is too slow, or too busy, for three runs of all of it."""
    piece = replace(request, prompt=min(request.prompt, 64))
    with torch.inference_mode():
        each = min(once(lambda: prefill(model, ids[:, : piece.prompt], piece), device) for _ in range(2))
    prompt = request.prompt
    while prompt > 64 and 3e-3 * each * prompt / piece.prompt > 0.6 * seconds:
        prompt //= 2
    return replace(request, prompt=prompt)


def prefill(model: LanguageModel, ids: torch.Tensor, request: Request) -> Output:
    """The whole prompt, chunk by chunk."""
    out: Output = model(ids[:, : request.chunk], logits_to_keep=1)
    for start in range(request.chunk, request.prompt, request.chunk):
        out = model(ids[:, start : start + request.chunk], out.state, logits_to_keep=1)
    return out


def decode(model: LanguageModel, out: Output, request: Request, device: torch.device, deadline: float) -> Times | None:
    """Single steps after a prompt, the first two unheard; None when nothing is to be generated."""
    if not request.generate:
        return None
    token = torch.zeros(request.batch, 1, dtype=torch.long, device=device)
    state, runs = out.state, []
    now = processor_clock() if device.type == "cpu" else time.perf_counter
    for index in range(request.generate + 2):
        synchronise(device)
        start = now()
        state = model(token, state, logits_to_keep=1).state
        synchronise(device)
        runs.append((now() - start) * 1e3)
        if index > 4 and time.perf_counter() > deadline:
            break
    return Times(tuple(runs[2:]))


def _training(
    spec: ModelSpec, model: LanguageModel, request: Request, device: torch.device, deadline: float, progress: Progress
) -> Measured:
    """Steps forward, backward and update."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = _tokens(spec, request, device)

    def step() -> None:
        training_step(model, optimizer, ids)

    progress(0.2, f"training steps of {request.prompt} tokens")
    step()
    peak, _ = tensor_peak_bytes(step, device)
    moments = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
    times = repeat(step, device, seconds=max(1.0, deadline - time.perf_counter()), least=2, most=10, warmups=0)
    progress(1.0, "done")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Measured(
        source="measured",
        request=replace(request, generate=0),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_bytes=weights,
        state_bytes=0,
        spare_bytes=moments,
        activation_bytes=peak,
        process_peak_bytes=_process_peak(device),
        prefill=times,
        decode=None,
        ran=ran(device, request, times, None),
        notes=("optimizer moments are counted as spare_bytes, gradients with the activations",),
    )


def training_step(model: LanguageModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """Forward, backward and update, over tokens that are their own labels."""
    loss = model(ids, labels=ids).loss
    if loss is None:
        raise MeasurementError(f"{model.spec.name} gives no loss")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def ran(device: torch.device, request: Request, prefill: Times | None, decode: Times | None) -> dict[str, Any]:
    """What was run, on what, how often."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "dtype": request.activations,
        "threads": torch.get_num_threads(),
        "clock": "process CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall",
        "torch": torch.__version__,
        "prompt": request.prompt,
        "generate": len(decode.runs) if decode else 0,
        "batch": request.batch,
        "prefill_runs": len(prefill.runs) if prefill else 0,
        "decode_runs": len(decode.runs) if decode else 0,
        "outliers": (prefill.outliers if prefill else 0) + (decode.outliers if decode else 0),
    }


def _tokens(spec: ModelSpec, request: Request, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (request.batch, request.prompt), generator=generator)
    return ids.to(device)


def _logits_bytes(out: Output) -> int:
    return out.logits.untyped_storage().nbytes() if out.logits is not None else 0


def _process_peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else process_peak_bytes()


def shortened(asked: Request, run: Request) -> tuple[str, ...]:
    notes = []
    if run.prompt < asked.prompt:
        notes.append(f"the prompt was shortened from {asked.prompt} to {run.prompt} tokens to end in time")
    if asked.precision != run.precision:
        notes.append(f"measured in {run.precision}: the native blocks have no {asked.precision} kernels")
    return tuple(notes)
