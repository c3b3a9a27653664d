"""The command that checks a prediction by measuring the same question, and what it leaves unchecked.

What is measured are our own blocks on one device, in the activations' dtype, for about `SECONDS` (`profiles.measure`).
"""

from __future__ import annotations

from dataclasses import replace
from shlex import quote

from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware, find
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request
from archcompass.profiles.units import GB

SECONDS = 45.0
"""About how long measuring takes where nobody says otherwise."""

ROOM = 0.6
"""Share of a device's free memory that a measured model may take; a larger one is measured block by block."""

_ASKED = ("precision", "kv_precision", "engine", "mode", "batch", "prompt", "generate", "optimizer", "recompute")


def command(called: str, request: Request, target: Hardware | None) -> str:
    """The question again, with the device to measure it on."""
    usual = Request()
    words = ["archcompass", "profile", quote(called)]
    words += ["--gpu", quote(target.tag), *_changed(target)] if target is not None else []
    for name in _ASKED:
        if (value := getattr(request, name)) != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--master-weights"] if request.master_weights else []
    words += ["--offload", f"{request.offload:g}"] if request.offload else []
    device = "cuda" if target is not None and _reached(target) else "cpu"
    return " ".join([*words, "--device", device])


def _changed(target: Hardware) -> list[str]:
    """The flags for figures of the card that were given instead of its own."""
    own = target if target.is_cpu else find(target.id)
    flags = {
        "--vram": (own.memory_bytes, target.memory_bytes, f"{target.memory_bytes / GB:.12g}GB"),
        "--bandwidth": (own.bandwidth_bytes_per_second, target.bandwidth_bytes_per_second,
                        f"{target.bandwidth_bytes_per_second / GB:.12g}GB/s"),
        "--tflops": (own.rate("bf16"), target.rate("bf16"), f"{target.rate('bf16') / 1e12:.12g}"),
    }  # fmt: skip
    return [word for flag, (before, now, said) in flags.items() if before != now for word in (flag, said)]


_OTHERS = ("Apple", "AWS", "Google", "Huawei", "Intel")
"""Vendors whose accelerators torch does not call "cuda", as it calls NVIDIA's and AMD's."""


def _reached(target: Hardware) -> bool:
    """Whether our blocks run on its accelerator; where they do not, the processor beside it is measured."""
    return not target.is_cpu and target.vendor not in _OTHERS


def unchecked(spec: ModelSpec, request: Request, target: Hardware | None) -> list[str]:
    """What of the question that command does not measure, each with what it measures instead."""
    found = []
    if request.precision != request.activations:
        found.append(f"{request.precision} weights (measured in {request.activations})")
    if request.kv_precision not in (None, request.activations):
        found.append(f"a cache in {request.kv_precision} (measured in {request.activations})")
    if request.engine != "native":
        found.append(f"{request.engine} (measured with our own blocks)")
    if target is None:
        return found
    if not target.is_cpu and not _reached(target):
        found.append("the accelerator itself, on which our blocks do not run (measured on the processor)")
    if target.count > 1:
        found.append(f"{target.count} cards together (measured on one)")
    if request.offload:
        found.append("experts in system memory (measured on the card)")
    return [*found, *_too_much(spec, request, replace(target, count=1))]


def _too_much(spec: ModelSpec, request: Request, card: Hardware) -> list[str]:
    """What one card has no room or no time for, as far as can be foreseen."""
    native = replace(request, precision=request.activations, kv_precision=None, engine="native", offload=0.0)
    foreseen = predict(spec, native, card.with_room_for_all())
    found = []
    if request.training and (request.recompute, request.optimizer, request.master_weights) != ("none", "adamw", False):
        found.append("how it is trained (measured with AdamW, nothing made again)")
    if foreseen.memory.total_bytes > ROOM * card.memory_bytes:
        found.append("the whole step (too much for it)" if request.training else "the whole model (block by block)")
    if 3.5e-3 * (foreseen.prefill_ms or 0.0) > ROOM * SECONDS:
        found.append(f"all {request.prompt:,} tokens of the prompt (shortened to what ends in {SECONDS:.0f} s)")
    return found
