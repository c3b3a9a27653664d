"""The delta rule under every kind of decay, and diagonal plus low rank. Beside flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from archcompass.kernels.delta_rule import delta_rule, delta_rule_cost, delta_rule_step, dplr, dplr_cost, dplr_step
from archcompass.kernels.dispatch import Backend
from gpu_suite.case import TINY, Call, Case, Inputs, Maker, Shape, Work, package, work
from gpu_suite.cases.linear_attention import DECAYS

FLA_DELTA = {
    "none": ("delta_rule", None), "scalar": ("gated_delta_rule", "g"), "vector": ("kda", "g"),
    "dplr": ("dplr_delta_rule", "gk"),
}  # fmt: skip


def delta_inputs(decay: str, step: bool = False) -> Callable[[Maker, Shape], Inputs]:
    def made(make: Maker, s: Shape) -> Inputs:
        lead = (s["batch"],) if step else (s["batch"], s["time"])
        heads, key = s["heads"], s["key"]
        found = {
            "q": make.unit(*lead, s["key_heads"], key), "k": make.unit(*lead, s["key_heads"], key),
            "v": make.normal(*lead, heads, s["value"]), "state": make.wide(s["batch"], heads, key, s["value"]),
        }  # fmt: skip
        if decay == "dplr":  # as RWKV-7: a is minus a key, and b that key times a rate of learning
            key_a = make.unit(*lead, heads, key)
            return found | {
                "a": -key_a,
                "b": key_a * make.strength(*lead, heads, key),
                "g": make.decay(*lead, heads, key),
            }
        found["beta"] = make.strength(*lead, heads)
        gate = {"none": (), "scalar": (*lead, heads), "vector": (*lead, heads, key)}[decay]
        return found | ({"g": make.decay(*gate)} if gate else {})

    return made


def delta_call(backend: Backend, q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor, g: Any = None) -> Any:
    if q.dim() == 3:
        with torch.no_grad():
            return delta_rule_step(q, k, v, beta, g, state=state, backend=backend)
    return delta_rule(q, k, v, beta, g, initial_state=state, backend=backend)


def dplr_call(backend: Backend, q: Tensor, k: Tensor, v: Tensor, state: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Any:
    if q.dim() == 3:
        with torch.no_grad():
            return dplr_step(q, k, v, a, b, g, state=state, backend=backend)
    return dplr(q, k, v, a, b, g, initial_state=state, backend=backend)


def fla_delta(name: str, gate: str | None = None) -> Call:
    def call(state: Tensor, g: Any = None, **tensors: Tensor) -> Any:
        step = tensors["q"].dim() == 3
        if step:
            tensors, g = {key: x[:, None] for key, x in tensors.items()}, None if g is None else g[:, None]
        gates = {gate: g} if gate else {}
        out, last = package("fla.ops", name)(
            **tensors, **gates, scale=1.0, initial_state=state, output_final_state=True
        )
        return (out[:, 0] if step else out), last

    return call


def delta_work(decay: Any, step: bool) -> Callable[[Shape], Work]:
    def of(s: Shape) -> Work:
        sizes = {"batch": s["batch"], "new_tokens": 1 if step else s["time"], "element_bytes": 2}
        widths = {"heads": s["heads"], "key_dim": s["key"], "value_dim": s["value"]}
        if decay == "dplr":
            return work(dplr_cost(**sizes, **widths))
        return work(delta_rule_cost(**sizes, **widths, key_heads=s["key_heads"], decay=decay))

    return of


def delta_case(decay: str, kind: str, size: str, shape: tuple[int, ...], quick: bool = False) -> Case:
    step, low_rank = kind == "step", decay == "dplr"
    name, gate = FLA_DELTA[decay]
    names = ("batch", "time", "key_heads", "heads", "key", "value")
    own = ("a", "b", "g") if low_rank else ("beta",) + (() if decay == "none" else ("g",))
    return Case(
        operation="dplr" if low_rank else "delta_rule", kind=kind if low_rank else f"{kind}, {DECAYS[decay]}", size=size,
        real=dict(zip(names, shape, strict=True)), check={"batch": 2, "time": 203},
        tiny=TINY | {"key_heads": 2 if low_rank else 1, "heads": 2, "key": 20, "value": 20},
        inputs=delta_inputs(decay, step), call=dplr_call if low_rank else delta_call, work=delta_work(decay, step),
        peers={"flash-linear-attention": fla_delta(f"{'fused_recurrent' if step else 'chunk'}_{name}", gate)},
        gradients=("q", "k", "v", *own) if kind == "backward" else (), quick=quick,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    prompt, many = (4, 4096, 16, 16, 128, 128), (128, 1, 16, 16, 128, 128)
    rwkv = (4, 4096, 64, 64, 64, 64)
    yield delta_case("scalar", "forward", "16 heads x 128, 4 x 4096", prompt, quick=True)
    yield delta_case("scalar", "backward", "16 heads x 128, 4 x 4096", prompt, quick=True)
    yield delta_case("scalar", "step", "16 heads x 128, batch 128", many, quick=True)
    yield delta_case("vector", "forward", "16 heads x 128, 4 x 4096", prompt)
    yield delta_case("vector", "backward", "16 heads x 128, 4 x 4096", prompt)
    yield delta_case("vector", "step", "16 heads x 128, batch 128", many)
    yield delta_case("dplr", "forward", "RWKV-7, 64 heads x 64, 4 x 4096", rwkv)
    yield delta_case("dplr", "backward", "RWKV-7, 64 heads x 64, 4 x 4096", rwkv)
    yield delta_case("dplr", "step", "RWKV-7, 64 heads x 64, batch 128", (128, 1, 64, 64, 64, 64))
    yield delta_case("none", "forward", "16 heads x 128, 4 x 4096", prompt)
    yield delta_case("scalar", "forward", "Qwen3-Next, 16/32 heads x 128, 4 x 4096", (4, 4096, 16, 32, 128, 128))
