"""The experts on the GPU, forward and backward, from two grouped products, as operators of torch.

Forward: one product with the gate, the up projection and the activation in it, one product that scatters back, one sum
over a token's choices. Backward keeps the inputs only: it computes the first product again without its activation, and
takes the gradient of a routing weight as (inner · its gradient), which saves the second.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.guard import on_its_device
from archcompass.kernels.moe.activations import Experts, experts_of
from archcompass.kernels.moe.grouped import flops_of
from archcompass.kernels.moe.triton_grouped import by_expert, grouped_rows, grouped_weights


def moe_triton(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """Shapes as `moe_mlp`."""
    result: Tensor = _moe(x, weights.to(x.dtype), chosen, *experts.tensors(), *experts.settings())
    return result


def forward(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """Launches the two products."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    tokens, top_k = chosen.shape
    groups = by_expert(chosen, gate_up.shape[0])
    weights = weights.contiguous()
    inner = grouped_rows(
        x, gate_up, groups, top_k=top_k, gather=True, scatter=False, bias=gate_up_bias, weights=weights,
        scale="input" if experts.scale_input else "", activation=experts.activation,
    )  # fmt: skip
    rows = grouped_rows(
        inner, down, groups, top_k=top_k, gather=False, scatter=True, bias=down_bias, weights=weights,
        scale="" if experts.scale_input else "output",
    )  # fmt: skip
    return rows.view(tokens, top_k, -1).sum(1)


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up, down and the biases (empty where there is none)."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    tokens, top_k = chosen.shape
    groups = by_expert(chosen, gate_up.shape[0])
    weights, grad = weights.contiguous(), grad.contiguous()
    order = groups.order.to(torch.int64)
    scale = weights.flatten()[order, None]
    before = grouped_rows(
        x, gate_up, groups, top_k=top_k, gather=True, scatter=False, bias=gate_up_bias, weights=weights,
        scale="input" if experts.scale_input else "",
    )  # fmt: skip
    inner = experts.activation(before)
    # The gradient of inner, not yet multiplied by the routing weight.
    d_inner = grouped_rows(grad, down.transpose(1, 2), groups, top_k=top_k, gather=True, scatter=False)
    d_before = experts.activation.backward(d_inner if experts.scale_input else d_inner * scale, before)
    d_down = grouped_weights(
        grad, inner, groups, top_k=top_k, gather_a=True, weights=weights, scale="" if experts.scale_input else "a"
    )
    d_gate_up = grouped_weights(
        d_before, x, groups, top_k=top_k, gather_b=True, weights=weights, scale="b" if experts.scale_input else ""
    )
    d_fed = grouped_rows(d_before, gate_up.transpose(1, 2), groups, top_k=top_k, gather=False, scatter=True)
    d_fed = d_fed.view(tokens, top_k, -1)
    expert = chosen.flatten()[order]
    g_rows = grad.index_select(0, order // top_k)
    if experts.scale_input:
        d_weights = (d_fed.float() * x.float().unsqueeze(1)).sum(-1)
        d_fed = d_fed * weights.unsqueeze(-1)
    else:
        d_sorted = (inner.float() * d_inner.float()).sum(-1)
        if down_bias is not None:
            d_sorted = d_sorted + (g_rows.float() * down_bias[expert].float()).sum(-1)
        d_weights = torch.empty_like(d_sorted).index_copy_(0, order, d_sorted).view_as(weights)
        g_rows = g_rows * scale
    biases = (_sum_by_expert(d_before, expert, gate_up_bias), _sum_by_expert(g_rows, expert, down_bias))
    return d_fed.sum(1), d_weights.to(weights.dtype), d_gate_up, d_down, *biases


def _sum_by_expert(rows: Tensor, expert: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return rows.new_empty(0)
    return rows.new_zeros(bias.shape, dtype=torch.float32).index_add_(0, expert, rows.float()).to(bias.dtype)


@torch.library.custom_op("archcompass::moe_triton", mutates_args=())
@on_its_device
def _moe(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, gated: bool, alpha: float, limit: float | None, up_offset: float,
    scale_input: bool,
) -> Tensor:  # fmt: skip
    given = (gate_up, down, gate_up_bias, down_bias, activation, gated, alpha, limit, up_offset, scale_input)
    return forward(x, weights, chosen, experts_of(*given))


@_moe.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("archcompass::moe_triton_backward", mutates_args=())
@on_its_device
def _moe_backward(
    grad: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, gated: bool, alpha: float,
    limit: float | None, up_offset: float, scale_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (gate_up, down, gate_up_bias, down_bias, activation, gated, alpha, limit, up_offset, scale_input)
    return backward(grad, x, weights, chosen, experts_of(*given))


@_moe_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    given = (x, weights, *rest[:4])
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    dx, dw, *parameters = _moe_backward(grad, *saved, *ctx.settings)
    given = (None if kept is None else p for p, kept in zip(parameters, saved[3:], strict=True))
    return dx, dw, None, *given, *[None] * len(ctx.settings)


_moe.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.archcompass.moe_triton)
def _flops(x: Any, weights: Any, chosen: Any, gate_up: Any, down: Any, *settings: Any, **_: Any) -> int:
    return flops_of(x, chosen, down, gated=settings[3])


@register_flop_formula(torch.ops.archcompass.moe_triton_backward)
def _backward_flops(
    grad: Any, x: Any, weights: Any, chosen: Any, gate_up: Any, down: Any, *settings: Any, **_: Any
) -> int:
    """Two products for each of the forward pass, and its first one again: with a gate 2 (3) + 2 of 3, else 2 (2) + 1."""
    gated = settings[3]
    forward_flops = flops_of(x, chosen, down, gated)
    return 2 * forward_flops + (forward_flops * 2 // 3 if gated else forward_flops // 2)
