"""`rotate`: rotary position embedding of the first dimensions of every head (arXiv 2104.09864)."""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.dispatch import Choice, choose, settled
from archcompass.kernels.rope.reference import rotate_reference


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto", strict: bool = False
) -> Tensor:
    """Turns each pair of the first R dimensions of every head by its position's angle; the other dimensions pass.

    Args:
        x: [batch, time, heads, D].
        cos, sin: [time, R/2] or [batch, time, R/2], one entry per pair. In float32 the products are float32 and the
            result is rounded to x's type once; in x's type nothing is widened.
        interleaved: pairs are (2i, 2i+1) (GPT-J, DeepSeek, Llama 4), else (i, i + R/2) (Llama, Qwen).
        backend: "auto", "reference", "torch" or "triton".
        strict: with "auto", refuse to fall back from the fastest backend.

    Raises:
        InputError: shapes that do not fit together.
        BackendError: the backend asked for cannot serve this call.
    """
    _check(x, cos, sin)
    chosen = "torch" if settled(backend, x) else explain(x, backend=backend, strict=strict).backend
    if chosen == "reference":
        return rotate_reference(x, cos, sin, interleaved=interleaved)
    if chosen == "triton":
        from archcompass.kernels.rope.triton_rope import rotate_triton

        return rotate_triton(x, cos, sin, interleaved)
    return _rotate_torch(x, cos, sin, interleaved)


def explain(x: Tensor, *, backend: str = "auto", strict: bool = False) -> Choice:
    """Which implementation `rotate` takes for `x`, and why."""
    refusals = {"triton": "the kernel computes in float32, and x is float64"} if x.dtype == torch.float64 else {}
    return choose("rotate", backend, x.device, refusals=refusals, strict=strict)


def rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of whole heads in halves, in three operations instead of six and with the same roundings: for single steps.

    Args:
        x: [batch, time, heads, D].
        cos, sin: [batch or 1, time, 1, D], in x's type: of the angles turned backwards, then as they are.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = x[..., : 2 * half]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    result = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    result = result.to(x.dtype)
    return result if 2 * half == x.shape[-1] else torch.cat((result, x[..., 2 * half :]), dim=-1)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(f"x has shape {list(x.shape)}; rotate takes [batch, time, heads, D]")
    if cos.shape != sin.shape or cos.ndim not in (2, 3):
        raise InputError(
            f"cos has shape {list(cos.shape)} and sin {list(sin.shape)}; both are [time, R/2] or [batch, time, R/2]"
        )
    if cos.shape[-2] != x.shape[1] or (cos.ndim == 3 and cos.shape[0] not in (1, x.shape[0])):
        raise InputError(f"cos has shape {list(cos.shape)}, but x is [batch, time, ...] = {list(x.shape[:2])}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise InputError(f"cos turns {2 * cos.shape[-1]} dimensions (2 per column), but a head has {x.shape[-1]}")
