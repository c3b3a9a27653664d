"""Rotary tables as tensors: cosine and sine of every new position, computed once per forward call."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from archcompass.blocks.rope import Rope
from archcompass.blocks.runtime import Context
from archcompass.kernels.rope import rotate, rotate_one


def table(rope: Rope, head_dim: int, context: Context, time: int, like: Tensor) -> tuple[Tensor, ...]:
    """Cosine and sine [batch or 1, time, rotary_dim / 2] of the new positions, in `like`'s dtype; angles in float32."""
    return _waves(rope, head_dim, context, time, like, _frequencies)


def turn(x: Tensor, rope: Rope | None, context: Context) -> Tensor:
    """x [batch, time, heads, head_dim] turned by its positions; unchanged without a rope."""
    if rope is None:
        return x
    if x.shape[1] == 1 and x.is_cpu and not rope.interleaved and rope.partial_rotary_factor == 1.0:
        return rotate_one(x, *_waves(rope, x.shape[-1], context, 1, x, _opposed_frequencies))
    cosine, sine = table(rope, x.shape[-1], context, x.shape[1], x)
    return rotate(x, cosine, sine, interleaved=rope.interleaved)


def _waves(
    rope: Rope, head_dim: int, context: Context, time: int, like: Tensor, frequencies: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """Cosine and sine of the new positions, made once a call for all layers."""
    key = (rope, head_dim, time, like.dtype, frequencies)
    if key not in context.tables:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        length = rope.settled(_length(context, time))
        turns = frequencies(rope, head_dim, length, like.device, wide)
        steps = context.positions(time, like.device).to(wide)
        angles = steps.view(*steps.shape, *[1] * turns.dim()) * turns
        cosine, sine = angles.cos(), angles.sin()
        if rope.amplitude != 1.0:
            cosine, sine = cosine * rope.amplitude, sine * rope.amplitude
        context.tables[key] = (cosine.to(like.dtype), sine.to(like.dtype))
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


@lru_cache(maxsize=256)
def _opposed_frequencies(rope: Rope, head_dim: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, rotary_dim] for `rotate_one`: the frequencies turned backwards, then as they are."""
    with torch.inference_mode(False):
        frequencies = _frequencies(rope, head_dim, length, device, dtype)
        return torch.cat((-frequencies, frequencies))[None]
