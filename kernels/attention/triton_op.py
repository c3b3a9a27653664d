"""The GPU kernels of attention as operators of torch: fake tensors, gradients, FLOPs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.attention import triton_backward, triton_decode, triton_forward, triton_latent, triton_sparse
from archcompass.kernels.attention.cost import visible_pairs
from archcompass.kernels.attention.intervals import intervals
from archcompass.kernels.attention.operator import attention_operator, nothing_seen
from archcompass.kernels.attention.pieces import Visibility, sinks_gradient
from archcompass.kernels.guard import on_its_device


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [batch, new, heads, Dv] and log-sum-exp [batch, new, heads]."""
    out, lse = _attention(q, k, v, sinks, padding, cu_seqlens, see)
    return out, lse.transpose(1, 2)


@on_its_device
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ends = intervals(q.shape[1], k.shape[1], see, padding, cu_seqlens, q.device)
    launch = triton_decode.split if triton_decode.suits(q, k) else triton_forward.forward
    return launch(q, k, v, sinks, *ends, see)


@on_its_device
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None, see: Visibility,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ends = intervals(q.shape[1], k.shape[1], see, padding, cu_seqlens, q.device)
    gradients = triton_backward.backward(grad, q, k, v, out, lse, *ends, see)
    return *gradients, q.new_empty(0) if sinks is None else sinks_gradient(grad, out, lse, sinks)


# Seven products where the forward pass has two: five, and the scores and the gradient of the weights once more.
_attention = attention_operator("attention_triton", _forward, _backward, backward_products=7)


def latent_triton(q: Tensor, latents: Tensor, padding: Tensor | None, rank: int, scale: float) -> Tensor:
    """Shapes as `latent.latent_attention`."""
    out: Tensor = _latent(q, latents, padding, rank, scale)[0]
    return out


@torch.library.custom_op("archcompass::latent_attention_triton", mutates_args=())
@on_its_device
def _latent(q: Tensor, latents: Tensor, padding: Tensor | None, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    return triton_latent.forward(q, latents, rank, *_causal_ends(q, latents, padding), scale)


@_latent.register_fake
def _(q: Tensor, latents: Tensor, padding: Tensor | None, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, new, heads, _ = q.shape
    return q.new_empty(batch, new, heads, rank), q.new_empty(batch, heads, new, dtype=torch.float32)


@torch.library.custom_op("archcompass::latent_attention_triton_backward", mutates_args=())
@on_its_device
def _latent_backward(
    grad: Tensor, q: Tensor, latents: Tensor, out: Tensor, lse: Tensor, padding: Tensor | None, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    return triton_latent.backward(grad, q, latents, out, lse, rank, *_causal_ends(q, latents, padding), scale)


@_latent_backward.register_fake
def _(grad: Tensor, q: Tensor, latents: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _like(latents)


def _setup_latent(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, latents, padding, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, latents, *output, padding)


def _latent_gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_latent_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


_latent.register_autograd(_latent_gradient, setup_context=_setup_latent)


@register_flop_formula(torch.ops.archcompass.latent_attention_triton)
def _latent_flops(q: Any, latents: Any, padding: Any, rank: int, *_: Any, **__: Any) -> int:
    return int(2 * q[0] * q[2] * visible_pairs(q[1], latents[1]) * (q[3] + rank))


@register_flop_formula(torch.ops.archcompass.latent_attention_triton_backward)
def _latent_backward_flops(
    grad: Any, q: Any, latents: Any, out: Any, lse: Any, padding: Any, rank: int, *_: Any, **__: Any
) -> int:
    """Scores and the gradient of the weights in both kernels; the gradients of q, of the keys and of the values."""
    return int(2 * q[0] * q[2] * visible_pairs(q[1], latents[1]) * (4 * q[3] + 3 * rank))


def sparse_triton(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Shapes as `sparse.sparse_attention`."""
    out, lse = _sparse(q, k, v, blocks.to(torch.int32).contiguous(), block_size, scale)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("archcompass::sparse_attention_triton", mutates_args=())
@on_its_device
def _sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    see = Visibility(True, None, None, 0, scale, None)
    return triton_decode.split(q, k, v, None, *_causal_ends(q, k, None), see, blocks, block_size)


_sparse.register_fake(nothing_seen)


@torch.library.custom_op("archcompass::sparse_attention_triton_backward", mutates_args=())
@on_its_device
def _sparse_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, out: Tensor, lse: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return triton_sparse.backward(grad, grad_lse, q, k, v, blocks, out, lse, block_size, scale)


@_sparse_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _setup_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _sparse_gradient(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_sparse_backward(grad, grad_lse, *ctx.saved_tensors, ctx.block_size, ctx.scale), None, None, None


_sparse.register_autograd(_sparse_gradient, setup_context=_setup_sparse)


def _chosen_pairs(q: Any, blocks: Any, block_size: int) -> int:
    return int(q[0] * q[1] * q[2] * blocks[3] * block_size)


@register_flop_formula(torch.ops.archcompass.sparse_attention_triton)
def _sparse_flops(q: Any, k: Any, v: Any, blocks: Any, block_size: int, *_: Any, **__: Any) -> int:
    """Whole blocks, as `sparse_attention_cost`."""
    return int(2 * _chosen_pairs(q, blocks, block_size) * (q[3] + v[3]))


@register_flop_formula(torch.ops.archcompass.sparse_attention_triton_backward)
def _sparse_backward_flops(
    grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, blocks: Any, out: Any, lse: Any, block_size: int,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return int(2 * _chosen_pairs(q, blocks, block_size) * (4 * q[3] + 3 * v[3]))


def _causal_ends(q: Tensor, keys: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    see = Visibility(True, None, None, 0, 1.0, None)
    return intervals(q.shape[1], keys.shape[1], see, padding, None, q.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
