"""Linear attention under every kind of decay: prompts, gradients, steps. Beside flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from archcompass.kernels import linear_attention
from archcompass.kernels.dispatch import Backend
from gpu_suite.case import TINY, Call, Case, Inputs, Maker, Shape, Work, package, work

DECAYS = {
    "none": "no decay", "constant": "constant decay", "scalar": "scalar decay", "vector": "vector decay",
    "exclusive": "vector decay and bonus",
}  # fmt: skip


def linear_inputs(decay: str, bonus: bool = False, step: bool = False) -> Callable[[Maker, Shape], Inputs]:
    def made(make: Maker, s: Shape) -> Inputs:
        lead = (s["batch"],) if step else (s["batch"], s["time"])
        heads, key = s["heads"], s["key"]
        shapes = {"constant": (heads,), "scalar": (*lead, heads), "vector": (*lead, heads, key)}
        found = {
            "q": make.normal(*lead, s["groups"], key), "k": make.normal(*lead, s["groups"], key),
            "v": make.normal(*lead, heads, s["value"]), "state": make.wide(s["batch"], heads, key, s["value"]),
        }  # fmt: skip
        if decay != "none":
            found["g"] = make.decay(*shapes[decay])
        return found | ({"bonus": make.wide(heads, key)} if bonus else {})

    return made


def linear_call(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Any = None, bonus: Any = None
) -> Any:
    settings = {"bonus": bonus, "exclusive": bonus is not None, "scale": q.shape[-1] ** -0.5}
    return linear_attention.linear_attention(q, k, v, g, initial_state=state, backend=backend, **settings)


def linear_step(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Any = None, bonus: Any = None
) -> Any:
    """The step of the torch path is a prompt of one token, because the public step takes the kernel where it can."""
    if backend == "triton":
        from archcompass.kernels.linear_attention.triton_op import step_op

        return step_op(q, k, v, g, bonus, state, bonus is not None, q.shape[-1] ** -0.5), state
    g = g if g is None or g.dim() == 1 else g[:, None]
    out, last = linear_call(backend, q[:, None], k[:, None], v[:, None], state, g, bonus)
    return out[:, 0], last


def fla_linear(name: str, gate: str | None = None, **fixed: Any) -> Call:
    """flash-linear-attention, which calls gates by different names; it has no shared keys, so they are repeated."""

    def call(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Any = None, bonus: Any = None) -> Any:
        step = q.dim() == 3
        if step:
            q, k, v = (x[:, None] for x in (q, k, v))
            g = g if g is None or g.dim() == 1 else g[:, None]
        if (share := v.shape[2] // q.shape[2]) > 1:
            q, k = (x.repeat_interleave(share, dim=2) for x in (q, k))
        gates = ({gate: g} if gate else {}) | ({} if bonus is None else {"u": bonus})
        first = {"r" if bonus is not None else "q": q}
        out, last = package("fla.ops", name)(
            **first, k=k, v=v, scale=q.shape[-1] ** -0.5, initial_state=state, output_final_state=True, **gates, **fixed
        )
        return (out[:, 0] if step else out), last

    return call


def linear_work(decay: Any, step: bool = False, bonus: bool = False) -> Callable[[Shape], Work]:
    def of(s: Shape) -> Work:
        widths = {"key_groups": s["groups"], "heads": s["heads"], "key_dim": s["key"], "value_dim": s["value"]}
        new = 1 if step else s["time"]
        cost = linear_attention.linear_attention_cost(
            batch=s["batch"], new_tokens=new, **widths, decay=decay, element_bytes=2, bonus=bonus
        )
        return work(cost)

    return of


CHUNKED: dict[str, Call] = {
    "none": fla_linear("chunk_linear_attn", normalize=False), "constant": fla_linear("chunk_simple_gla", "g_gamma"),
    "scalar": fla_linear("chunk_simple_gla", "g"), "vector": fla_linear("chunk_gla", "g"),
    "exclusive": fla_linear("chunk_rwkv6", "w"),
}  # fmt: skip

STEPS: dict[str, Call] = {
    "none": fla_linear("fused_recurrent_linear_attn", normalize=False), "scalar": fla_linear("fused_recurrent_simple_gla", "g"),
    "vector": fla_linear("fused_recurrent_gla", "gk"), "exclusive": fla_linear("fused_recurrent_rwkv6", "w"),
}  # fmt: skip


def linear_case(mode: str, kind: str, size: str, shape: tuple[int, ...], quick: bool = False) -> Case:
    """`mode` is the decay, or "exclusive" for a vector decay with bonus; `kind` forward, backward or step."""
    step, bonus, decay = kind == "step", mode == "exclusive", "vector" if mode == "exclusive" else mode
    gates = () if decay == "none" else ("g",)
    names = ("batch", "time", "groups", "heads", "key", "value")
    tiny = TINY | {"groups": 1 if decay != "vector" else 2, "heads": 2, "key": 20, "value": 20}
    return Case(
        operation="linear_attention", kind=f"{kind}, {DECAYS[mode]}", size=size, real=dict(zip(names, shape, strict=True)),
        check={"batch": 2, "time": 203}, tiny=tiny, inputs=linear_inputs(decay, bonus, step),
        call=linear_step if step else linear_call, work=linear_work(decay, step, bonus),
        peers={"flash-linear-attention": (STEPS if step else CHUNKED)[mode]},
        gradients=("q", "k", "v", *gates) if kind == "backward" else (), quick=quick,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    prompt, mamba, many = (4, 4096, 16, 16, 128, 128), (4, 4096, 1, 80, 128, 64), (128, 1, 16, 16, 128, 128)
    yield linear_case("scalar", "forward", "16 heads x 128, 4 x 4096", prompt, quick=True)
    yield linear_case("scalar", "backward", "16 heads x 128, 4 x 4096", prompt, quick=True)
    yield linear_case("scalar", "step", "16 heads x 128, batch 128", many, quick=True)
    yield linear_case("scalar", "forward", "Mamba-2 2.7B, 80 heads of 128 x 64, 4 x 4096", mamba)
    yield linear_case("vector", "forward", "16 heads x 128, 4 x 4096", prompt)
    yield linear_case("vector", "backward", "16 heads x 128, 4 x 4096", prompt)
    yield linear_case("vector", "step", "16 heads x 128, batch 128", many)
    yield linear_case("constant", "forward", "16 heads x 128, 4 x 4096", prompt)
    yield linear_case("none", "forward", "16 heads x 128, 4 x 4096", prompt)
    yield linear_case("exclusive", "forward", "RWKV-6, 64 heads x 64, 4 x 4096", (4, 4096, 64, 64, 64, 64))
    yield linear_case("constant", "backward", "16 heads x 128, 4 x 4096", prompt)
