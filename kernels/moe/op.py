"""`moe_mlp`: the routed experts of a mixture behind one name, with the backend and its reason."""

from collections.abc import Callable

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.dispatch import Choice, choose, settled
from archcompass.kernels.moe.activations import Activation, Experts
from archcompass.kernels.moe.grouped import grouped_mm_obstacle, moe_dense_equivalent, moe_grouped, moe_grouped_mm
from archcompass.kernels.moe.reference import moe_reference

GROUPED_MM_REASON = "torch's grouped_mm serves this call; our kernel has not been measured against it yet"


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    scale_input: bool = False,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Runs every token through its chosen experts and sums them by weight: y = Σ_k w_k down(f(gate_up x)).

    Args:
        x: [tokens, hidden].
        weights, experts: [tokens, k] from `route`; a token's experts differ from each other.
        gate_up: [E, 2 I, hidden], the gate's rows before the up projection's; [E, I, hidden] with gated=False.
        down: [E, hidden, I].
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "swish" for x sigmoid(alpha x).
        gated: f(gate) * up, else f(up).
        gate_up_bias, down_bias: [E, 2 I] (or [E, I]) and [E, hidden].
        alpha, limit, up_offset: of the activation, see `activations.Activation`; gpt-oss is activation="swish",
            alpha=1.702, limit=7.0, up_offset=1.0.
        scale_input: the weights multiply the experts' input, not their output (Llama 4).
        backend: "auto", "reference", "torch" or "triton".
        strict: with "auto", refuse to fall back from the fastest backend.

    Returns:
        [tokens, hidden] in x's type.

    Raises:
        InputError: shapes or settings that do not fit together.
        BackendError: the backend asked for cannot serve this call.
    """
    act = Activation(activation, gated, alpha, limit, up_offset)
    _check(x, weights, experts, gate_up, down, gate_up_bias, down_bias, gated)
    matrices = Experts(gate_up, down, gate_up_bias, down_bias, act, scale_input)
    if settled(backend, x):
        return moe_grouped(x, weights, experts, matrices)
    choice = explain(x, down, backend=backend, strict=strict)
    if x.device.type == "meta":
        return moe_dense_equivalent(x, weights, gate_up, down, act)
    serve = moe_reference if choice.backend == "reference" else _run(choice, x, down)
    return serve(x, weights, experts, matrices)


def explain(x: Tensor, down: Tensor, *, backend: str = "auto", strict: bool = False) -> Choice:
    """Which implementation `moe_mlp` takes for tokens `x` and experts `down`, and why."""
    obstacle = grouped_mm_obstacle(x, down)
    if backend == "auto" and x.device.type == "cuda" and obstacle is None:
        return Choice("moe_mlp", "torch", GROUPED_MM_REASON)
    refusals = {"triton": "the kernels sum in float32, and x is float64"} if x.dtype == torch.float64 else {}
    return choose("moe_mlp", backend, x.device, refusals=refusals, strict=strict)


def _run(choice: Choice, x: Tensor, down: Tensor) -> Callable[..., Tensor]:
    if choice.backend == "triton":
        from archcompass.kernels.moe.triton_moe import moe_triton

        return moe_triton
    return moe_grouped if x.device.type == "cpu" or grouped_mm_obstacle(x, down) else moe_grouped_mm


def _check(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
) -> None:
    if x.ndim != 2:
        raise InputError(f"x has shape {list(x.shape)}; moe_mlp takes [tokens, hidden]")
    if weights.shape != experts.shape or experts.ndim != 2 or experts.shape[0] != x.shape[0]:
        raise InputError(
            f"weights {list(weights.shape)} and experts {list(experts.shape)} must both be [{x.shape[0]}, k]"
        )
    if gate_up.ndim != 3 or down.ndim != 3:
        raise InputError(f"gate_up {list(gate_up.shape)} and down {list(down.shape)} must have three dimensions")
    count, rows, hidden = gate_up.shape
    inner = rows // 2 if gated else rows
    if hidden != x.shape[1] or (gated and rows % 2) or down.shape != (count, hidden, inner):
        wanted = "[E, 2 I, hidden]" if gated else "[E, I, hidden]"
        raise InputError(
            f"gate_up {list(gate_up.shape)} must be {wanted} and down {list(down.shape)} [E, hidden, I], "
            f"with hidden {x.shape[1]} as in x"
        )
    for name, bias, width in (("gate_up_bias", gate_up_bias, rows), ("down_bias", down_bias, hidden)):
        if bias is not None and bias.shape != (count, width):
            raise InputError(f"{name} has shape {list(bias.shape)}; it must be [{count}, {width}]")
    if experts.dtype not in (torch.int64, torch.int32):
        raise InputError(f"experts has type {experts.dtype}; indices are int64 or int32")
