"""The loss chunk by chunk of tokens: logits of one chunk, their loss, their gradients, then the next.

The gradients of the hidden states and of the head are computed in the forward pass, when the logits are at hand
(Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2): backward only multiplies them by the incoming scalar.
One weight per token (1/count for the mean, 1 for the sum) makes one code of both reductions; unreduced losses take a
backward of their own that computes the logits again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.cross_entropy.cost import linear_cross_entropy_cost


def losses_of(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    chunk: int,
) -> Tensor:
    """Unreduced losses [tokens], 0 where ignored, at least float32."""
    losses: Tensor = _losses(hidden, weight, targets, ignore_index, soft_cap, scale, chunk)
    return losses


def weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    chunk: int,
) -> Tensor:
    """Σ token_weight loss, a scalar whose gradients are ready when it is."""
    settings = (ignore_index, soft_cap, scale, chunk)
    loss: Tensor = _loss_and_gradients(hidden, weight, targets, token_weights, *settings)[0]
    return loss


@torch.library.custom_op("archcompass::linear_cross_entropy", mutates_args=())
def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    chunk: int,
) -> Tensor:
    losses = hidden.new_empty(targets.shape, dtype=_wide(hidden))
    for span in _chunks(targets, chunk):
        logits = hidden[span] @ weight.t()
        losses[span] = _loss_and_slope(logits, targets[span], None, ignore_index, soft_cap, scale)[0]
    return losses


@_losses.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *_rest: Any) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=_wide(hidden))


@torch.library.custom_op("archcompass::linear_cross_entropy_gradients", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_zeros((), dtype=_wide(hidden))
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    spans = _chunks(targets, chunk)
    # Low-precision gradients of several chunks are summed in float32.
    d_weight = torch.zeros_like(weight, dtype=_wide(weight) if len(spans) > 1 else weight.dtype)
    for span in spans:
        h, share = hidden[span], token_weights[span]
        losses, d_logits = _loss_and_slope(h @ weight.t(), targets[span], share, ignore_index, soft_cap, scale)
        total += (losses * share).sum()
        torch.mm(d_logits, weight, out=d_hidden[span])
        if d_weight.dtype == h.dtype:
            d_weight.addmm_(d_logits.t(), h)
        else:
            d_weight += d_logits.t() @ h
    return total, d_hidden, d_weight.to(weight.dtype)


@_loss_and_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    return hidden.new_empty((), dtype=_wide(hidden)), d_hidden, d_weight


def _setup_ready(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _gradient_ready(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = (x * grad.to(x.dtype) for x in ctx.saved_tensors)
    return d_hidden, d_weight, *[None] * 6


_loss_and_gradients.register_autograd(_gradient_ready, setup_context=_setup_ready)


def _setup_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _gradient_losses(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, d_hidden, d_weight = _loss_and_gradients(*ctx.saved_tensors, grad, *ctx.settings)
    return d_hidden, d_weight, *[None] * 5


_losses.register_autograd(_gradient_losses, setup_context=_setup_losses)


@register_flop_formula(torch.ops.archcompass.linear_cross_entropy)
def _flops_losses(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _cost(hidden, weight, training=False)


@register_flop_formula(torch.ops.archcompass.linear_cross_entropy_gradients)
def _flops_gradients(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _cost(hidden, weight, training=True)


def _cost(hidden: Any, weight: Any, training: bool) -> int:
    cost = linear_cross_entropy_cost(
        tokens=hidden[0], width=hidden[1], vocab=weight[0], element_bytes=1, training=training
    )
    return cost.flops


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(targets: Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, targets.shape[0], chunk)]


def _loss_and_slope(
    logits: Tensor, targets: Tensor, share: Tensor | None, ignore_index: int, soft_cap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Losses [tokens] and, where `share` [tokens] is given, Σ share loss differentiated by the logits, in their type."""
    scaled = logits.to(_wide(logits)) * scale
    squashed = None
    if soft_cap is not None:
        squashed = torch.tanh(scaled / soft_cap)
        scaled = soft_cap * squashed
    known = targets != ignore_index
    target = targets.masked_fill(~known, 0).unsqueeze(-1)
    log_sum = scaled.logsumexp(-1, keepdim=True)
    losses = (log_sum - scaled.gather(-1, target)).squeeze(-1) * known
    if share is None:
        return losses, logits
    slope = scaled.sub_(log_sum).exp_()
    slope.scatter_add_(-1, target, torch.full_like(log_sum, -1.0))
    slope *= (share * known * scale).unsqueeze(-1)
    if squashed is not None:
        slope *= 1 - squashed.square()
    return losses, slope.to(logits.dtype)
