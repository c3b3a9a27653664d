"""Rotary tables as tensors: cosine and sine of every new position, computed once per forward call."""

from functools import lru_cache

import torch
from torch import Tensor

from archcompass.blocks.rope import Rope
from archcompass.blocks.runtime import Context
from archcompass.kernels.rope import rotate, rotate_one


def table(rope: Rope, head_dim: int, context: Context, time: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [batch or 1, time, rotary_dim / 2] of the new positions, in `like`'s dtype; angles in float32."""
    key = (rope, head_dim, time, like.dtype)
    if key not in context.tables:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        length = rope.settled(_length(context, time))
        angles = context.positions(time, like.device).to(wide)[..., None] * _frequencies(
            rope, head_dim, length, like.device, wide
        )
        cosine, sine = angles.cos(), angles.sin()
        if rope.amplitude != 1.0:
            cosine, sine = cosine * rope.amplitude, sine * rope.amplitude
        context.tables[key] = (cosine.to(like.dtype), sine.to(like.dtype))
    cosine, sine = context.tables[key]
    return cosine, sine


def turn(x: Tensor, rope: Rope | None, context: Context) -> Tensor:
    """x [batch, time, heads, head_dim] turned by its positions; unchanged without a rope."""
    if rope is None:
        return x
    if x.shape[1] == 1 and x.is_cpu and not rope.interleaved and rope.partial_rotary_factor == 1.0:
        return rotate_one(x, *_table_of_one(rope, context, x))
    cosine, sine = table(rope, x.shape[-1], context, x.shape[1], x)
    return rotate(x, cosine, sine, interleaved=rope.interleaved)


def _table_of_one(rope: Rope, context: Context, x: Tensor) -> tuple[Tensor, ...]:
    """What `rotate_one` wants of a step's one position, made once for all layers."""
    key = (rope, x.shape[-1], x.dtype)
    if key not in context.tables:
        cosine, sine = (part.unsqueeze(-2) for part in table(rope, x.shape[-1], context, 1, x))
        context.tables[key] = (torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))
    return context.tables[key]


def _length(context: Context, time: int) -> int:
    """Tokens of the longest sequence after this call, padding left out."""
    length = context.past + time
    if context.padding is None or context.padding.device.type == "meta":
        return length
    return length - int(context.padding.min())


@lru_cache(maxsize=256)
def _frequencies(rope: Rope, head_dim: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[rotary_dim / 2], an ordinary tensor even when first asked for in inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(rope.inverse_frequencies(head_dim, length), device=device, dtype=dtype)
