"""Rotary tables as tensors: cosine and sine of every new position, computed once per forward call."""

import torch
from torch import Tensor

from archcompass.blocks.rope import Rope
from archcompass.blocks.runtime import Context
from archcompass.kernels.rope import rotate


def table(rope: Rope, head_dim: int, context: Context, time: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [batch or 1, time, rotary_dim / 2] of the new positions, in `like`'s dtype; angles in float32."""
    key = (rope, head_dim, time, like.dtype)
    if key not in context.tables:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        frequencies = torch.tensor(rope.inverse_frequencies(head_dim), device=like.device, dtype=wide)
        angles = context.positions(time, like.device).to(wide)[..., None] * frequencies
        cosine, sine = angles.cos() * rope.amplitude, angles.sin() * rope.amplitude
        context.tables[key] = (cosine.to(like.dtype), sine.to(like.dtype))
    cosine, sine = context.tables[key]
    return cosine, sine


def turn(x: Tensor, rope: Rope | None, context: Context) -> Tensor:
    """x [batch, time, heads, head_dim] turned by its positions; unchanged without a rope."""
    if rope is None:
        return x
    cosine, sine = table(rope, x.shape[-1], context, x.shape[1], x)
    return rotate(x, cosine, sine, interleaved=rope.interleaved)
