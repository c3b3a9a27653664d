"""One model asked several questions in a row, shortest first, until the time is over or the memory would be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from archcompass.blocks.model.module import LanguageModel, Output
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.ledger import memory
from archcompass.profiles.measure import build, heap
from archcompass.profiles.measure.clock import Times, repeat
from archcompass.profiles.measure.model import Progress, decode, native_request, prefill, silent
from archcompass.profiles.measure.peak import tensor_peak_bytes
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one question took.

    Attributes:
        request: the question.
        memory_bytes: weights, state and the most that was alive beside them.
        prefill: the whole prompt of every sequence.
        decode: one step at the average context; None when nothing was generated.
    """

    request: Request
    memory_bytes: int
    prefill: Times
    decode: Times | None


@heap.held()
def sweep(
    spec: ModelSpec,
    requests: Sequence[Request],
    hardware: Hardware,
    *,
    device: str = "cpu",
    seconds: float = 15.0,
    progress: Progress = silent,
) -> list[Seen]:
    """Builds `spec` once and asks it `requests` in turn.

    A question that should not run twice in the time that is left, by the pace of the one before it, is not begun, nor any
    after it; nor one that takes more than six tenths of the free memory.

    Raises:
        InputError: no such device.
    """
    place, deadline = build.device_of(device), time.perf_counter() + seconds
    model = build.model(spec, place, build.DTYPES["bf16"])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    roomy, seen = hardware.with_room_for_all(), list[Seen]()
    for index, asked in enumerate(map(native_request, requests)):
        if seen and 1e-3 * _next_ms(spec, seen[-1], asked, roomy) > deadline - time.perf_counter():
            break
        if memory(spec, asked, roomy).total_bytes > 0.6 * build.available_bytes(place):
            break
        progress(index / len(requests), f"{asked.batch} x {asked.prompt} tokens")
        share = (deadline - time.perf_counter()) / (len(requests) - index)
        seen.append(_ask(model, asked, place, weights, share))
    progress(1.0, "done")
    return seen


def _ask(model: LanguageModel, asked: Request, place: torch.device, weights: int, seconds: float) -> Seen:
    ids = torch.randint(0, model.spec.vocab_size, (asked.batch, asked.prompt), device=place)
    until = time.perf_counter() + seconds
    with torch.inference_mode():
        first: list[Output] = []
        peak, _ = tensor_peak_bytes(lambda: first.append(prefill(model, ids, asked)), place)
        again = repeat(lambda: prefill(model, ids, asked), place, seconds=0.5 * seconds, least=1, most=7, warmups=0)
        steps = decode(model, first[0], asked, place, until)
    return Seen(request=asked, memory_bytes=weights + peak, prefill=again, decode=steps)


def _next_ms(spec: ModelSpec, last: Seen, asked: Request, roomy: Hardware) -> float:
    """Two runs of the next question, if it takes as much longer as predicted."""
    before, after = (predict(spec, request, roomy).prefill_ms or 1.0 for request in (last.request, asked))
    return 2 * last.prefill.ms * after / before
