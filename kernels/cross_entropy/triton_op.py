"""The fused head and loss as operators of torch: fake tensors, gradients, FLOPs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.cross_entropy import triton_loss
from archcompass.kernels.cross_entropy.cost import linear_cross_entropy_cost
from archcompass.kernels.guard import on_its_device

COLUMNS = 128  # chunks of the vocabulary are whole tiles


def losses_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    chunk: int,
) -> Tensor:
    """Unreduced losses [tokens], float32; backward holds no more of the logits' gradient than `chunk` tokens have."""
    columns = chunk * weight.shape[0] // max(1, hidden.shape[0]) // COLUMNS * COLUMNS
    settings = (ignore_index, soft_cap, scale, max(COLUMNS, columns))
    losses: Tensor = _losses(hidden, weight, targets, *settings)[0]
    return losses


@torch.library.custom_op("archcompass::linear_cross_entropy_triton", mutates_args=())
@on_its_device
def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    columns: int,
) -> tuple[Tensor, Tensor]:
    return triton_loss.forward(hidden, weight, targets, ignore_index, soft_cap, scale)


@_losses.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(targets.shape, dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("archcompass::linear_cross_entropy_triton_backward", mutates_args=())
@on_its_device
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    columns: int,
) -> tuple[Tensor, Tensor]:
    return triton_loss.backward(grad, hidden, weight, targets, log_sum, ignore_index, soft_cap, scale, columns)


@_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    d_hidden, d_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    return d_hidden, d_weight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.settings = inputs[3:]


def _gradient(ctx: Any, grad: Tensor, _grad_log_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 5


_losses.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.archcompass.linear_cross_entropy_triton)
def _flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    cost = linear_cross_entropy_cost(
        tokens=hidden[0], width=hidden[1], vocab=weight[0], element_bytes=1, training=False
    )
    return cost.flops


@register_flop_formula(torch.ops.archcompass.linear_cross_entropy_triton_backward)
def _backward_flops(grad: Any, hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The logits again, and the gradients of both their factors."""
    return 3 * _flops(hidden, weight)
