"""Rotary embedding on the GPU: one read and one write of every head, cosines and sines read once per position.

Memory-bound. The backward pass is the same kernel with the angle turned round.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.guard import on_its_device
from archcompass.kernels.tiles import Row, Table, Tile, next_power_of_two

TILES = Table(
    "rope",
    (
        Row(Tile({"BLOCK_H": 16}, warps=4), upto={"width": 128}),
        Row(Tile({"BLOCK_H": 4}, warps=4)),
    ),
)


@triton.jit(do_not_specialize=["time", "table_batch"])
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_time, x_head, table_batch, time,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    batch = position // time
    step = position % time
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_P)
    table = batch * table_batch + step * HALF + pair
    cos = tl.load(cos_ptr + table, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin = -sin
    x_ptr += batch * x_batch + step * x_time
    out_ptr += position * HEADS * WIDTH
    one = pair * 2 if INTERLEAVED else pair
    other = one + 1 if INTERLEAVED else one + HALF
    inside = (head < HEADS)[:, None] & (pair < HALF)[None, :]
    x_row, out_row = head[:, None] * x_head, head[:, None] * WIDTH
    a = tl.load(x_ptr + x_row + one[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + x_row + other[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_row + one[None, :], (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + out_row + other[None, :], (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)
    if WIDTH > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        inside = (head < HEADS)[:, None] & (rest < WIDTH)[None, :]
        tl.store(out_ptr + out_row + rest[None, :], tl.load(x_ptr + x_row + rest[None, :], mask=inside), mask=inside)


def launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    """Launches the kernel; shapes as `rotate`. Returns a contiguous tensor like x."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, time, heads, width = x.shape
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = TILES.pick(x.device, width=width)
    if out.numel():
        _rotate_kernel[(batch * time, triton.cdiv(heads, tile.blocks["BLOCK_H"]))](
            x, cos, sin, out, *x.stride()[:3], time * half if cos.ndim == 3 and cos.shape[0] > 1 else 0, time,
            HEADS=heads, WIDTH=width, HALF=half, INTERLEAVED=interleaved, BACKWARD=backward,
            BLOCK_P=next_power_of_two(half), BLOCK_REST=next_power_of_two(width - 2 * half), **tile.launch(),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Shapes as `rotate`; no gradient for the table."""
    result: Tensor = _rotate(x, cos, sin, interleaved, False)
    return result


@torch.library.custom_op("archcompass::rotate_triton", mutates_args=())
@on_its_device
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    return launch(x, cos, sin, interleaved, backward)


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _rotate(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.backward), None, None, None, None


_rotate.register_autograd(_gradient, setup_context=_setup)
