"""The GPU kernels of attention as operators of torch: fake tensors, gradients, FLOPs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.attention import triton_backward, triton_decode, triton_forward
from archcompass.kernels.attention.cost import visible_pairs
from archcompass.kernels.attention.intervals import intervals
from archcompass.kernels.attention.pieces import Visibility, sinks_gradient

BACKWARD_PRODUCTS = 7 / 2  # seven products where the forward pass has two: five, and the scores twice again


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [batch, new, heads, Dv] and log-sum-exp [batch, new, heads]."""
    settings = (see.causal, see.window, see.chunk, see.key_offset, see.scale, see.soft_cap)
    out, lse = _attention(q, k, v, sinks, padding, cu_seqlens, *settings)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("archcompass::attention_triton", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
    causal: bool, window: int | None, chunk: int | None, key_offset: int, scale: float, soft_cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
    first, last = intervals(q.shape[1], k.shape[1], see, padding, cu_seqlens, q.device)
    if triton_decode.suits(q, k):
        return triton_decode.split(q, k, v, sinks, first, last, see)
    return triton_forward.forward(q, k, v, sinks, first, last, see)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    batch, new, heads, _ = q.shape
    return q.new_empty(batch, new, heads, v.shape[-1]), q.new_empty(batch, heads, new, dtype=torch.float32)


@torch.library.custom_op("archcompass::attention_triton_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
    causal: bool, window: int | None, chunk: int | None, key_offset: int, scale: float, soft_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
    first, last = intervals(q.shape[1], k.shape[1], see, padding, cu_seqlens, q.device)
    gradients = triton_backward.backward(grad, q, k, v, out, lse, first, last, see)
    return *gradients, q.new_empty(0) if sinks is None else sinks_gradient(grad, out, lse, sinks)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, *rest: Any) -> Any:
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *gradients, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, padding, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, sinks, padding, cu_seqlens)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, d_sinks = _attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    has_sinks = ctx.saved_tensors[5] is not None
    return (*tensors, d_sinks if has_sinks else None, *[None] * (2 + len(ctx.settings)))


_attention.register_autograd(_gradient, setup_context=_setup)


def _forward_flops(q: Any, k: Any, v: Any, settings: tuple[Any, ...]) -> int:
    causal, window, chunk, key_offset = settings[:4]
    return int(2 * q[0] * q[2] * visible_pairs(q[1], k[1], causal, window, chunk, key_offset) * (q[3] + v[3]))


@register_flop_formula(torch.ops.archcompass.attention_triton)
def _flops(q: Any, k: Any, v: Any, sinks: Any, padding: Any, cu_seqlens: Any, *settings: Any, **_: Any) -> int:
    """Visible pairs, as `attention_cost`; padding and packing, whose values a counter does not see, count in full."""
    return _forward_flops(q, k, v, settings)


@register_flop_formula(torch.ops.archcompass.attention_triton_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sinks: Any, padding: Any, cu_seqlens: Any,
    *settings: Any, **_: Any,
) -> int:  # fmt: skip
    return int(BACKWARD_PRODUCTS * _forward_flops(q, k, v, settings))
