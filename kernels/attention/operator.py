"""One operator of torch over an implementation of attention: schema, fake tensors, gradients, FLOPs.

The path of plain torch and that of Triton are registered by the same few lines, so that torch.compile, autograd and
counters see both alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.attention.cost import visible_pairs
from archcompass.kernels.attention.pieces import Visibility

# (q, k, v, sinks, padding, cu_seqlens, see) to output [batch, new, heads, Dv] and log-sum-exp [batch, heads, new].
Forward = Callable[..., tuple[Tensor, Tensor]]
# (grad, q, k, v, out, lse, sinks, padding, cu_seqlens, see) to the gradients of q, k, v and sinks (empty without them).
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def attention_operator(name: str, forward: Forward, backward: Backward, backward_products: int) -> Forward:
    """Registers `archcompass::name` and its backward.

    Args:
        backward_products: matrix products of the backward pass, where the forward pass has two.

    Returns:
        the operator, called as `forward`.
    """

    @torch.library.custom_op(f"archcompass::{name}", mutates_args=())
    def run(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int | None, chunk: int | None, key_offset: int, scale: float, soft_cap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
        return forward(q, k, v, sinks, padding, cu_seqlens, see)

    @torch.library.custom_op(f"archcompass::{name}_backward", mutates_args=())
    def run_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int | None, chunk: int | None, key_offset: int, scale: float, soft_cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
        return backward(grad, q, k, v, out, lse, sinks, padding, cu_seqlens, see)

    def gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
        *tensors, d_sinks = run_backward(grad, *saved, *ctx.settings)
        return (*tensors, None if saved[5] is None else d_sinks, *[None] * (2 + len(ctx.settings)))

    def backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
        return forward_flops(q, k, v, *rest[2:]) * backward_products // 2

    run.register_fake(nothing_seen)
    run_backward.register_fake(_like_inputs)
    run.register_autograd(gradient, setup_context=_keep)
    register_flop_formula(getattr(torch.ops.archcompass, name))(forward_flops)
    register_flop_formula(getattr(torch.ops.archcompass, f"{name}_backward"))(backward_flops)

    def call(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *tensors, see = others
        settings = (see.causal, see.window, see.chunk, see.key_offset, see.scale, see.soft_cap)
        out, lse = run(q, k, v, *tensors, *settings)
        return out, lse

    return call


def nothing_seen(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    """Outputs of queries that see nothing: zeros, and minus infinity in at least float32."""
    batch, new, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((batch, heads, new), float("-inf"), dtype=wide, device=q.device)
    return q.new_zeros(batch, new, heads, v.shape[-1]), lse


def forward_flops(
    q: Any, k: Any, v: Any, sinks: Any, padding: Any, cu_seqlens: Any, causal: bool, window: int | None,
    chunk: int | None, key_offset: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Visible pairs, as `attention_cost`; padding and packing, whose values a counter does not see, count in full."""
    pairs = visible_pairs(q[1], k[1], causal, window, chunk, key_offset)
    return int(2 * q[0] * q[2] * pairs * (q[3] + v[3]))


def _like_inputs(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, *_rest: Any
) -> tuple[Tensor, ...]:
    gradients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *gradients, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, padding, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, sinks, padding, cu_seqlens)
