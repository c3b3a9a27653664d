"""What the report draws beyond the recommendation: the sweep, the decision map, the roofline of the pick, its layers.

Plain data, gathered once and kept in report.json, so that a saved report can be drawn again without asking the engine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from archcompass.advisor.compare import CONTEXTS, compare
from archcompass.advisor.reading import Reading
from archcompass.advisor.recommend import Recommendation
from archcompass.advisor.sensitivity import decision_map
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.workload import Workload, choices
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.predict import Call, predict
from archcompass.profiles.request import Request


def gather(workload: Workload, answer: Recommendation) -> dict[str, Any]:
    """All pictures' data for an answer."""
    pick, hardware = answer.candidates[0], Reading.of(workload).hardware
    asked = replace(Ask(Reading.of(workload)).request(pick.precision), **pick.runs)
    return {
        "comparison": compare(workload).model_dump(mode="json"),
        "map": decision_map(workload, "context", "breadth", columns=CONTEXTS, rows=choices("breadth")),
        "roofline": roofline(pick.model, asked, hardware),
        "layers": layers(pick.model),
    }


def layers(spec: ModelSpec) -> list[list[dict[str, str]]]:
    """Every layer, as its sublayers: name, what a person calls it, and its role."""
    told = {
        name: {"name": name, "label": block.label or block.kind, "role": block.traits.role}
        for name, block in spec.blocks.items()
    }
    return [[told[name] for name in layer] for layer in spec.expanded]


def roofline(spec: ModelSpec, request: Request, hardware: Hardware) -> dict[str, Any]:
    """The two roofs of one card, and every operation of prefill and decode under them.

    An operation stands where its FLOPs per byte put it; how long it takes of its phase is the size of its mark.
    """
    found = predict(spec, request, hardware)
    points = []
    if found.prefill and not request.training:
        _, step = request.prefill_steps()[0]
        points += _points("prefill", spec, step, found.prefill)
    if found.decode:
        points += _points("decode", spec, request.decode_step(), found.decode)
    return {
        "card": hardware.name,
        "bandwidth_bytes_per_second": hardware.bandwidth_bytes_per_second,
        "flops_per_second": {name: rate for name, rate in hardware.flops.items() if name in ("bf16", "fp16", "fp8")},
        "points": points,
    }


def _points(phase: str, spec: ModelSpec, step: Any, call: Call) -> list[dict[str, Any]]:
    """Operations of one phase that compute at all, joined with the share of time the prediction gives them."""
    shares = {(part.name, part.kind): part.ms / call.ms for part in call.parts}
    bounds = {(part.name, part.kind): part.bound for part in call.parts}
    work = [op for op in spec.work(step) if op.flops and op.bytes and (op.name, op.kind) in shares]
    return [
        {
            "phase": phase,
            "name": op.name,
            "kind": op.kind,
            "flops_per_byte": op.flops / op.bytes,
            "share": shares[op.name, op.kind],
            "bound": bounds[op.name, op.kind],
        }
        for op in work
    ]
