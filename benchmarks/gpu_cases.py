"""What `gpu.py` measures: every operation, at the shape of a model that people run, beside who else offers it.

A case is one call at three sizes. `real` is timed. `check` changes it to a size that the formula in float64 can follow on
the same device, the widths being kept so that the same kernels are compiled. `tiny` is for Triton's interpreter. Work is
that of the operation's own cost function. Where a case has gradients it is the backward pass that is timed: FLOPs are
`backward_products` times those of the forward pass (every product has two gradients; attention makes five products of
two), bytes every input read, and every gradient read or written, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    conv1d,
    cross_entropy,
    logsigmoid,
    normalize,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

from archcompass.kernels import conv, diagonal_scan, linear_attention, norm, rope, selective_scan
from archcompass.kernels.attention import (
    attention,
    attention_cost,
    latent_attention,
    latent_attention_cost,
    sparse_attention,
    sparse_attention_cost,
)
from archcompass.kernels.cost import Cost
from archcompass.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_cost
from archcompass.kernels.delta_rule import delta_rule, delta_rule_cost, delta_rule_step, dplr, dplr_cost, dplr_step
from archcompass.kernels.dispatch import Backend
from archcompass.kernels.moe import expected_distinct_experts, moe_cost, moe_mlp, route

Shape = Mapping[str, int]
Inputs = dict[str, Tensor]
Call = Callable[..., Any]

TINY = {"batch": 1, "time": 37}


@dataclass(frozen=True)
class Maker:
    """Makes inputs of a case on a device: `normal` in the dtype under test, `wide` ones in float32 (gates, states)."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def wide(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def unit(self, *shape: int) -> Tensor:
        """Keys of length one, as the delta rule wants them."""
        return normalize(self.wide(*shape), dim=-1).to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        """Log decays as trained gates give them: mostly close to 0, sometimes strong."""
        return logsigmoid(self.wide(*shape) + 3.0)

    def strength(self, *shape: int) -> Tensor:
        return self.wide(*shape).sigmoid().to(self.dtype)


class Work(NamedTuple):
    """FLOPs and the least bytes of one call."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. `call(backend, **inputs)` and every peer `(**inputs)` return a tensor or a tuple of them."""

    operation: str
    kind: str
    size: str
    real: Shape
    inputs: Callable[[Maker, Shape], Inputs]
    call: Call
    work: Callable[[Shape], Work]
    check: Shape = field(default_factory=dict)
    tiny: Shape = field(default_factory=dict)
    peers: Mapping[str, Call] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    backward_products: float = 2.0
    together: bool = False  # forward and backward are one piece of work, and `work` counts both
    dtype: torch.dtype = torch.bfloat16
    interpreted: torch.dtype = torch.float32  # bfloat16 is not to be trusted in the interpreter
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.operation} {self.kind}, {self.size}"


def work(cost: Cost, more_bytes: float = 0.0) -> Work:
    """The work that a cost function states, and bytes it leaves to its caller (weights)."""
    return Work(cost.flops, cost.activation_bytes + cost.state_bytes + more_bytes)


def package(module: str, name: str) -> Call:
    """A function of a package that may not be here; it is looked up when the case is run."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call


def heads_of(make: Maker, s: Shape) -> Inputs:
    new = s.get("new", s["keys"])
    keys = (s["batch"], s["keys"], s["kv_heads"], s["dim"])
    return {"q": make.normal(s["batch"], new, s["heads"], s["dim"]), "k": make.normal(*keys), "v": make.normal(*keys)}


def sdpa(backend: SDPBackend) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped, causal = q.shape[2] > k.shape[2], q.shape[1] > 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return call


SDPA = {
    "torch SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "torch SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
}


def attention_work(window: int | None = None) -> Callable[[Shape], Work]:
    def of(s: Shape) -> Work:
        return work(
            attention_cost(
                batch=s["batch"], new_tokens=s.get("new", s["keys"]), keys=s["keys"], heads=s["heads"],
                kv_heads=s["kv_heads"], key_dim=s["dim"], value_dim=s["dim"], window=window, element_bytes=2,
            )
        )  # fmt: skip

    return of


def attention_case(
    kind: str, size: str, batch: int, keys: int, heads: int, kv_heads: int, dim: int, **more: Any
) -> Case:
    step = kind == "decode"
    real = {"batch": batch, "keys": keys, "heads": heads, "kv_heads": kv_heads, "dim": dim} | (
        {"new": 1} if step else {}
    )
    tiny = {"batch": 1, "keys": 70 if step else 37, "heads": 2, "kv_heads": 1, "dim": 16}
    window = more.pop("window", None)

    def call(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Any:
        near = window if window is None or k.shape[1] > window else k.shape[1] // 3
        return attention(q, k, v, window=near, backend=backend)

    others = SDPA if window is None else {"our torch path": lambda q, k, v: call("torch", q, k, v)}
    if step:
        others = {"torch path, SDPA by kv head": lambda q, k, v: call("torch", q, k, v), **SDPA}
    return Case(
        operation="attention", kind=kind, size=size, real=real, check={"batch": 2, "keys": 333}, tiny=tiny, call=call,
        inputs=heads_of, work=attention_work(window), peers=others, backward_products=2.5, **more,
    )  # fmt: skip


def latent_inputs(make: Maker, s: Shape) -> Inputs:
    width = s["rank"] + s["rope"]
    return {"q": make.normal(s["batch"], 1, s["heads"], width), "latents": make.normal(s["batch"], s["keys"], width)}


def latent_call(backend: Backend, q: Tensor, latents: Tensor) -> Any:
    return latent_attention(q, latents, latents.shape[-1] * 8 // 9, scale=0.1, backend=backend)


def latent_work(s: Shape) -> Work:
    widths = {"rank": s["rank"], "rope_dim": s["rope"], "element_bytes": 2}
    cost = latent_attention_cost(batch=s["batch"], new_tokens=1, keys=s["keys"], heads=s["heads"], **widths)
    return work(cost)


def sparse_inputs(make: Maker, s: Shape) -> Inputs:
    """Random blocks for every query and kv head, none of them in the future."""
    now = torch.arange(s["keys"], device=make.device)[:, None] // s["block"]
    block = torch.arange(-(-s["keys"] // s["block"]), device=make.device)
    liking = torch.rand(s["batch"], s["keys"], s["kv_heads"], len(block), device=make.device)
    best = liking.masked_fill((block > now)[None, :, None], -1.0).topk(min(s["slots"], len(block)), dim=-1)
    return heads_of(make, s) | {"blocks": best.indices.masked_fill(best.values < 0, -1)}


def sparse_call(block: int) -> Call:
    def call(backend: Backend, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Any:
        return sparse_attention(q, k, v, blocks, block, backend=backend)

    return call


def sparse_work(s: Shape) -> Work:
    sizes = {"slots": s["slots"], "block_size": s["block"], "element_bytes": 2}
    heads = {"heads": s["heads"], "kv_heads": s["kv_heads"], "key_dim": s["dim"], "value_dim": s["dim"]}
    return work(sparse_attention_cost(batch=s["batch"], new_tokens=s["keys"], **heads, **sizes))


def attention_cases() -> Iterator[Case]:
    leaves = ("q", "k", "v")
    yield attention_case("prefill", "16 heads x 128, 2 x 8192", 2, 8192, 16, 16, 128, quick=True)
    yield attention_case("decode", "32/8 heads x 128, 32 x 8192", 32, 8192, 32, 8, 128, quick=True)
    yield attention_case("backward", "16 heads x 128, 2 x 8192", 2, 8192, 16, 16, 128, gradients=leaves, quick=True)
    yield attention_case("prefill", "32/8 heads x 128, 4 x 4096", 4, 4096, 32, 8, 128)
    yield attention_case("prefill", "32 heads x 64, 2 x 8192", 2, 8192, 32, 32, 64)
    yield attention_case("prefill in a window", "32/8 heads x 128, 16384, 1024 seen", 1, 16384, 32, 8, 128, window=1024)
    yield attention_case("decode", "32/8 heads x 128, 1 x 131072", 1, 131072, 32, 8, 128)
    yield attention_case("backward", "32 heads x 64, 2 x 8192", 2, 8192, 32, 32, 64, gradients=leaves)
    yield Case(
        operation="latent_attention", kind="decode", size="128 heads, 512 + 64, 32 x 4096",
        real={"batch": 32, "keys": 4096, "heads": 128, "rank": 512, "rope": 64}, check={"batch": 2, "keys": 333},
        tiny={"batch": 1, "keys": 40, "heads": 2, "rank": 32, "rope": 4}, inputs=latent_inputs, call=latent_call,
        work=latent_work, peers={"torch path, SDPA": lambda q, latents: latent_call("torch", q, latents)},
        interpreted=torch.float16,
    )  # fmt: skip
    yield Case(
        operation="sparse_attention", kind="prefill", size="32/2 heads x 128, 4096, 16 blocks of 64",
        real={"batch": 1, "keys": 4096, "heads": 32, "kv_heads": 2, "dim": 128, "slots": 16, "block": 64},
        check={"keys": 333, "slots": 4}, tiny={"keys": 70, "heads": 2, "kv_heads": 1, "dim": 16, "slots": 1},
        inputs=sparse_inputs, call=sparse_call(64), work=sparse_work,
    )  # fmt: skip


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


DECAYS = {
    "none": "no decay", "constant": "constant decay", "scalar": "scalar decay", "vector": "vector decay",
    "exclusive": "vector decay and bonus",
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


def linear_cases() -> Iterator[Case]:
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


FLA_DELTA = {
    "none": ("delta_rule", None), "scalar": ("gated_delta_rule", "g"), "vector": ("kda", "g"),
    "dplr": ("dplr_delta_rule", "gk"),
}  # fmt: skip


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


def delta_cases() -> Iterator[Case]:
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


def mamba_inputs(make: Maker, s: Shape) -> Inputs:
    lead = (s["batch"], s["time"]) if "time" in s else (s["batch"],)
    channels, n = s["channels"], s["state"]
    found = {
        "x": make.normal(*lead, channels), "dt": make.strength(*lead, channels), "A": -make.wide(channels, n).exp(),
        "B": make.normal(*lead, n), "C": make.normal(*lead, n), "D": make.wide(channels), "gate": make.normal(*lead, channels),
    }  # fmt: skip
    return found | ({} if "time" in s else {"state": make.wide(s["batch"], channels, n)})


def mamba_call(
    backend: Backend, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor
) -> Any:
    return selective_scan.selective_scan(x, dt, A, B, C, D, gate=gate, backend=backend)


def mamba_step(
    backend: Backend, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Tensor
) -> Any:
    with torch.no_grad():
        return selective_scan.selective_scan_step(x, dt, A, B, C, D, backend=backend, **rest)


def mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Any:
    """mamba-ssm wants channels before time; the copies it makes of ours are part of its time."""
    x, dt, B, C, gate = (t.transpose(1, 2).contiguous() for t in (x, dt, B, C, gate))
    call = package("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    y, last = call(x, dt, A, B, C, D, gate, return_last_state=True)
    return y.transpose(1, 2), last


def mamba_work(s: Shape) -> Work:
    sizes = {"batch": s["batch"], "new_tokens": s.get("time", 1), "channels": s["channels"], "state_dim": s["state"]}
    return work(selective_scan.selective_scan_cost(**sizes, element_bytes=2, gated=True))


def diagonal_inputs(make: Maker, s: Shape) -> Inputs:
    whole = (s["batch"], s["time"], s["channels"])
    return {"g": make.decay(*whole), "x": make.wide(*whole), "state": make.wide(s["batch"], s["channels"])}


def diagonal_call(backend: Backend, g: Tensor, x: Tensor, state: Tensor) -> Any:
    return diagonal_scan.diagonal_scan(g, x, initial_state=state, backend=backend)


def diagonal_work(s: Shape) -> Work:
    return work(diagonal_scan.diagonal_scan_cost(batch=s["batch"], new_tokens=s["time"], channels=s["channels"]))


def scan_cases() -> Iterator[Case]:
    mamba: dict[str, Any] = {
        "operation": "selective_scan", "size": "Mamba 2.8B, 5120 x 16, 4 x 4096", "inputs": mamba_inputs,
        "call": mamba_call, "work": mamba_work, "peers": {"mamba-ssm, with its copies": mamba_ssm},
        "real": {"batch": 4, "time": 4096, "channels": 5120, "state": 16},
        "check": {"batch": 2, "time": 203, "channels": 256}, "tiny": TINY | {"channels": 20, "state": 8},
    }  # fmt: skip
    yield Case(**mamba, kind="forward", quick=True)
    yield Case(**mamba, kind="backward", gradients=("x", "dt", "A", "B", "C", "D", "gate"))
    one = {"batch": 128, "channels": 5120, "state": 16}
    step = {"size": "Mamba 2.8B, 5120 x 16, batch 128", "call": mamba_step, "real": one, "check": {}, "peers": {}}
    yield Case(**mamba | step | {"tiny": {"batch": 3, "channels": 20, "state": 8}}, kind="step")
    diagonal: dict[str, Any] = {
        "operation": "diagonal_scan", "size": "4096 channels, 4 x 4096", "dtype": torch.float32,
        "inputs": diagonal_inputs, "call": diagonal_call, "work": diagonal_work,
        "peers": {"our torch path": lambda g, x, state: diagonal_call("torch", g, x, state)},
        "real": {"batch": 4, "time": 4096, "channels": 4096}, "check": {"batch": 2, "time": 203},
        "tiny": TINY | {"channels": 20},
    }  # fmt: skip
    yield Case(**diagonal, kind="forward", quick=True)
    yield Case(**diagonal, kind="backward", gradients=("g", "x"))


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


def moe_cases() -> Iterator[Case]:
    leaves = ("x", "weights", "gate_up", "down")
    yield moe_case("forward", "Qwen3-30B, 128 choose 8, 8192 tokens", (8192, 128, 8, 2048, 768), quick=True)
    yield moe_case("forward", "Mixtral 8x7B, 8 choose 2, 8192 tokens", (8192, 8, 2, 4096, 14336))
    yield moe_case("forward", "Qwen3-30B, 128 choose 8, 32 tokens", (32, 128, 8, 2048, 768))
    yield moe_case("backward", "Qwen3-30B, 128 choose 8, 8192 tokens", (8192, 128, 8, 2048, 768), gradients=leaves)


def norm_inputs(*also: str) -> Callable[[Maker, Shape], Inputs]:
    def made(make: Maker, s: Shape) -> Inputs:
        found = {"x": make.normal(s["rows"], s["width"]), "weight": make.normal(s["width"])}
        return found | {name: make.normal(s["rows"], s["width"]) for name in also}

    return made


def norm_call(backend: Backend, x: Tensor, weight: Tensor, **also: Any) -> Any:
    return norm.rms_norm(x, weight, 1e-6, backend=backend, **also)


def norm_work(**also: bool) -> Callable[[Shape], Work]:
    return lambda s: work(norm.rms_norm_cost(rows=s["rows"], width=s["width"], element_bytes=2, **also))


def liger_norm(x: Tensor, weight: Tensor) -> Any:
    return package("liger_kernel.transformers.functional", "liger_rms_norm")(x, weight, 1e-6, in_place=False)


def liger_add_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    return package("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")(
        x, residual, weight, 1e-6, in_place=False
    )


def norm_case(kind: str, size: str, shape: tuple[int, int], peers: dict[str, Call], *also: str, **more: Any) -> Case:
    return Case(
        operation="rms_norm", kind=kind, size=size, real={"rows": shape[0], "width": shape[1]}, check={"rows": 203},
        tiny={"rows": 5, "width": 40}, inputs=norm_inputs(*also), call=norm_call,
        work=norm_work(**dict.fromkeys(also, True)), peers=peers, **more,
    )  # fmt: skip


def conv_inputs(make: Maker, s: Shape) -> Inputs:
    found = {
        "x": make.normal(s["batch"], s["time"], s["channels"]), "weight": make.normal(s["channels"], 4),
        "bias": make.normal(s["channels"]),
    }  # fmt: skip
    return found | ({"state": make.normal(s["batch"], 3, s["channels"])} if s["time"] == 1 else {})


def conv_call(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> Any:
    return conv.causal_conv(x, weight, bias, activation="silu", initial_state=state, backend=backend)


def conv_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    y = conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=len(weight))
    return silu(y[..., : x.shape[1]]).transpose(1, 2)


def conv_dao(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    call = package("causal_conv1d", "causal_conv1d_fn")
    return call(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def conv_fla(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return package("fla.modules.conv", "causal_conv1d")(x=x, weight=weight, bias=bias, activation="silu")[0]


def conv_work(s: Shape) -> Work:
    sizes = {"batch": s["batch"], "new_tokens": s["time"], "channels": s["channels"], "width": 4}
    return work(conv.causal_conv_cost(**sizes, element_bytes=2))


def loss_inputs(make: Maker, s: Shape) -> Inputs:
    targets = torch.randint(s["vocab"], (s["tokens"],), device=make.device)
    weight = make.normal(s["vocab"], s["width"]).mul_(s["width"] ** -0.5)
    return {"hidden": make.normal(s["tokens"], s["width"]), "weight": weight, "targets": targets}


def loss_call(backend: Backend, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return linear_cross_entropy(hidden, weight, targets, backend=backend)


def loss_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return cross_entropy((hidden @ weight.t()).float(), targets)


def loss_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return package("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")(hidden, weight, targets)


def loss_work(s: Shape) -> Work:
    sizes = {"tokens": s["tokens"], "width": s["width"], "vocab": s["vocab"]}
    head_bytes = 2 * s["vocab"] * s["width"] * 2  # read, and its gradient written
    return work(linear_cross_entropy_cost(**sizes, element_bytes=2, training=True), head_bytes)


def rope_inputs(make: Maker, s: Shape) -> Inputs:
    angles = make.wide(s["time"], s["dim"] // 2)
    heads = make.normal(s["batch"], s["time"], s["heads"], s["dim"])
    return {"x": heads, "cos": angles.cos(), "sin": angles.sin()}


def rope_call(backend: Backend, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rope.rotate(x, cos, sin, backend=backend)


def rope_work(s: Shape) -> Work:
    sizes = {"batch": s["batch"], "time": s["time"], "heads": s["heads"], "head_dim": s["dim"]}
    return work(rope.rotate_cost(**sizes, rotary_dim=s["dim"], element_bytes=2))


def other_cases() -> Iterator[Case]:
    plain = {"torch rms_norm": lambda x, weight: rms_norm(x, x.shape[-1:], weight, 1e-6), "Liger": liger_norm}
    yield norm_case("forward", "16384 x 4096", (16384, 4096), plain, quick=True)
    yield norm_case("forward with residual", "16384 x 4096", (16384, 4096), {"Liger": liger_add_norm}, "residual")
    yield norm_case("forward with gate", "16384 x 4096", (16384, 4096), {}, "gate")
    yield norm_case("backward", "16384 x 4096", (16384, 4096), plain, gradients=("x", "weight"))
    conv_peers = {"causal-conv1d": conv_dao, "flash-linear-attention": conv_fla, "torch conv1d": conv_torch}
    filtered: dict[str, Any] = {
        "operation": "causal_conv", "inputs": conv_inputs, "call": conv_call, "work": conv_work,
        "real": {"batch": 4, "time": 4096, "channels": 8192}, "check": {"batch": 2, "time": 203},
        "tiny": TINY | {"channels": 20}, "size": "8192 channels, width 4, 4 x 4096", "peers": conv_peers,
    }  # fmt: skip
    yield Case(**filtered, kind="forward", quick=True)
    yield Case(**filtered, kind="backward", gradients=("x", "weight", "bias"))
    step = {
        "real": {"batch": 128, "time": 1, "channels": 8192},
        "size": "8192 channels, width 4, batch 128",
        "check": {},
    }
    yield Case(**filtered | step | {"peers": {}, "tiny": {"batch": 2, "time": 1, "channels": 20}}, kind="step")
    yield Case(
        operation="cross_entropy", kind="forward and backward", size="4096 to 128256, 8192 tokens",
        real={"tokens": 8192, "width": 4096, "vocab": 128256}, check={"tokens": 203, "width": 512, "vocab": 4000},
        tiny={"tokens": 7, "width": 16, "vocab": 50}, inputs=loss_inputs, call=loss_call, work=loss_work, together=True,
        peers={"torch, all logits": loss_torch, "Liger": loss_liger}, gradients=("hidden", "weight"), quick=True,
    )  # fmt: skip
    rope_peers = {
        "our torch path": lambda x, cos, sin: rope_call("torch", x, cos, sin),
        "flash-linear-attention": package("fla.modules.rotary", "rotary_embedding"),
    }
    yield Case(
        operation="rotate", kind="forward", size="32 heads x 128, 4 x 4096", inputs=rope_inputs, call=rope_call,
        real={"batch": 4, "time": 4096, "heads": 32, "dim": 128}, check={"batch": 2, "time": 203}, work=rope_work,
        tiny={"batch": 1, "time": 5, "heads": 2, "dim": 16}, peers=rope_peers, quick=True,
    )  # fmt: skip


def cases() -> list[Case]:
    """All of them; those of a quick run, which are the issue's targets, come first."""
    makers = (attention_cases, linear_cases, delta_cases, scan_cases, moe_cases, other_cases)
    return sorted((case for made in makers for case in made()), key=lambda case: not case.quick)
