"""Experts: many, some and few rows for each, and gradients. Beside torch's grouped_mm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from archcompass.kernels.dispatch import Backend
from archcompass.kernels.moe import expected_distinct_experts, moe_cost, moe_mlp, route
from gpu_suite.case import Case, Inputs, Maker, Shape, Work, work


def moe_inputs(make: Maker, s: Shape) -> Inputs:
    hidden, inner, experts = s["hidden"], s["inner"], s["experts"]
    weights, chosen = route(make.wide(s["tokens"], experts), s["top_k"])
    return {
        "x": make.normal(s["tokens"], hidden), "weights": weights, "chosen": chosen,
        "gate_up": make.normal(experts, 2 * inner, hidden).mul_(hidden**-0.5),
        "down": make.normal(experts, hidden, inner).mul_(inner**-0.5),
    }  # fmt: skip


def moe_call(backend: Backend, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Any:
    return moe_mlp(x, weights, chosen, gate_up, down, backend=backend)


def moe_work(s: Shape) -> Work:
    sizes = {"hidden": s["hidden"], "intermediate": s["inner"], "experts": s["experts"], "top_k": s["top_k"]}
    read = expected_distinct_experts(s["experts"], s["top_k"], s["tokens"]) * 3 * s["hidden"] * s["inner"] * 2
    return work(moe_cost(tokens=s["tokens"], **sizes, gated=True, element_bytes=2), read)


def moe_case(kind: str, size: str, shape: tuple[int, ...], **more: Any) -> Case:
    names = ("tokens", "experts", "top_k", "hidden", "inner")
    tiny = {"tokens": 9, "experts": 4, "top_k": 2, "hidden": 24, "inner": 16}
    return Case(
        operation="moe_mlp", kind=kind, size=size, real=dict(zip(names, shape, strict=True)), tiny=tiny,
        check={"tokens": 61, "hidden": 512, "inner": 256}, inputs=moe_inputs, call=moe_call, work=moe_work,
        peers={"torch grouped_mm": lambda **tensors: moe_call("torch", **tensors)}, **more,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    leaves = ("x", "weights", "gate_up", "down")
    yield moe_case("forward", "Qwen3-30B, 128 choose 8, 8192 tokens", (8192, 128, 8, 2048, 768), quick=True)
    yield moe_case("forward", "Mixtral 8x7B, 8 choose 2, 8192 tokens", (8192, 8, 2, 4096, 14336))
    yield moe_case("forward", "Qwen3-30B, 128 choose 8, 32 tokens", (32, 128, 8, 2048, 768))
    yield moe_case("backward", "Qwen3-30B, 128 choose 8, 8192 tokens", (8192, 128, 8, 2048, 768), gradients=leaves)
