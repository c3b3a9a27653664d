"""What waits for memory: RMS normalisation, causal convolution, rotary positions. Beside Liger, causal-conv1d and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.functional import conv1d, rms_norm, silu

from archcompass.kernels import conv, norm, rope
from archcompass.kernels.dispatch import Backend
from gpu_suite.case import TINY, Call, Case, Inputs, Maker, Shape, Work, package, work


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


def rope_inputs(make: Maker, s: Shape) -> Inputs:
    angles = make.wide(s["time"], s["dim"] // 2)
    heads = make.normal(s["batch"], s["time"], s["heads"], s["dim"])
    return {"x": heads, "cos": angles.cos(), "sin": angles.sin()}


def rope_call(backend: Backend, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rope.rotate(x, cos, sin, backend=backend)


def rope_work(s: Shape) -> Work:
    sizes = {"batch": s["batch"], "time": s["time"], "heads": s["heads"], "head_dim": s["dim"]}
    return work(rope.rotate_cost(**sizes, rotary_dim=s["dim"], element_bytes=2))


def cases() -> Iterator[Case]:
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
    rope_peers = {
        "our torch path": lambda x, cos, sin: rope_call("torch", x, cos, sin),
        "flash-linear-attention": package("fla.modules.rotary", "rotary_embedding"),
    }
    yield Case(
        operation="rotate", kind="forward", size="32 heads x 128, 4 x 4096", inputs=rope_inputs, call=rope_call,
        real={"batch": 4, "time": 4096, "heads": 32, "dim": 128}, check={"batch": 2, "time": 203}, work=rope_work,
        tiny={"batch": 1, "time": 5, "heads": 2, "dim": 16}, peers=rope_peers, quick=True,
    )  # fmt: skip
