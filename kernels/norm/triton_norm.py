"""RMS normalisation on the GPU: one pass forward, one pass backward, residual and gate fused in.

Memory-bound: forward reads x (and residual, gate) once and writes y (and the sum) once. The backward pass recomputes
what is cheap from the saved reciprocal root mean square, and sums the weight's gradient over rows in registers, so only
a few partial sums per program are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.guard import on_its_device
from archcompass.kernels.norm.tiles import BACKWARD, FORWARD, MOST_PARTIAL_SUMS
from archcompass.kernels.tiles import next_power_of_two


@triton.jit
def _activate(z, SIGMOID: tl.constexpr):
    """act(z) and its slope."""
    s = tl.sigmoid(z)
    if SIGMOID:
        value, slope = s, s * (1.0 - s)
    else:
        value, slope = z * s, s * (1.0 + z * (1.0 - s))
    return value, slope


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, residual_ptr, gate_ptr, y_ptr, sum_ptr, rstd_ptr,
    rows, width, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    at = row[:, None] * width + group * SIZE + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if gate_ptr is not None:
        opened, _ = _activate(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), SIGMOID)
        if GATE_FIRST:
            x *= opened
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + group * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        y *= (weight + 1.0 if UNIT_OFFSET else weight)[None, :]
    if gate_ptr is not None and not GATE_FIRST:
        y *= opened
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row * tl.num_programs(1) + group, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, gate_ptr, rstd_ptr, dx_ptr, dgate_ptr, partial_ptr,
    rows, width,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + group * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        weight = weight + 1.0 if UNIT_OFFSET else weight
    dweight = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < SIZE)[None, :]
        at = row[:, None] * width + group * SIZE + column[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row * tl.num_programs(1) + group, mask=row < rows, other=0.0)[:, None]
        normed = x * rstd
        if gate_ptr is not None:
            opened, slope = _activate(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), SIGMOID)
            if GATE_FIRST:
                normed *= opened
            else:
                tl.store(dgate_ptr + at, (dy * normed * weight * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
                dy *= opened
        dweight += tl.sum(dy * normed, axis=0)
        dnormed = dy * weight
        dx = (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / SIZE)[:, None]) * rstd
        if gate_ptr is not None and GATE_FIRST:
            tl.store(dgate_ptr + at, (dx * x * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
            dx *= opened
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * width + group * SIZE + column
        tl.store(partial_ptr + at, dweight, mask=column < SIZE)


def forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None,
    eps: float, gate_first: bool, sigmoid: bool, group_size: int, unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel.

    Returns:
        y like x; residual + x like x (without a residual, empty); the reciprocal root mean squares, [rows, groups].
    """
    width = x.shape[-1]
    rows, groups = x.numel() // max(width, 1), width // group_size
    y = torch.empty_like(x)
    summed = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty((rows, groups), dtype=torch.float32)
    tile = FORWARD.pick(x.device, size=group_size)
    if rows:
        _rms_norm_forward_kernel[(triton.cdiv(rows, tile.blocks["ROWS"]), groups)](
            x, weight, residual, gate, y, None if residual is None else summed, rstd, rows, width, eps,
            SIZE=group_size, BLOCK=next_power_of_two(group_size), GATE_FIRST=gate_first, SIGMOID=sigmoid,
            UNIT_OFFSET=unit_offset, **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return y, summed, rstd


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, gate: Tensor | None, rstd: Tensor,
    gate_first: bool, sigmoid: bool, group_size: int, unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernel.

    Args:
        x: what was normalised (with a residual, the sum).

    Returns:
        gradients of x, of the gate and of the weight; empty where there is none.
    """
    width = x.shape[-1]
    rows, groups = rstd.shape
    tile = BACKWARD.pick(x.device, size=group_size)
    programs = min(triton.cdiv(rows, tile.blocks["ROWS"]), MOST_PARTIAL_SUMS)
    dx = torch.empty_like(x)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    partial = None if weight is None else x.new_empty((programs, width), dtype=torch.float32)
    if rows:
        _rms_norm_backward_kernel[(programs, groups)](
            dy, dsum, x, weight, gate, rstd, dx, None if gate is None else dgate, partial, rows, width,
            SIZE=group_size, BLOCK=next_power_of_two(group_size), GATE_FIRST=gate_first, SIGMOID=sigmoid,
            UNIT_OFFSET=unit_offset, **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    if weight is None or partial is None:
        return dx, dgate, x.new_empty(0)
    return dx, dgate, partial.sum(0).to(weight.dtype)


@torch.library.custom_op("archcompass::rms_norm_triton", mutates_args=())
@on_its_device
def rms_norm_op(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None,
    eps: float, gate_first: bool, sigmoid: bool, group_size: int, unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` as an operator of torch."""
    return forward(
        x.contiguous(), _contiguous(weight), _contiguous(residual), _contiguous(gate),
        eps, gate_first, sigmoid, group_size, unit_offset,
    )  # fmt: skip


@rms_norm_op.register_fake
def _(x, weight, residual, gate, eps, gate_first, sigmoid, group_size, unit_offset):
    summed = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty((x.numel() // x.shape[-1], x.shape[-1] // group_size), dtype=torch.float32)
    return x.new_empty(x.shape), summed, rstd


@torch.library.custom_op("archcompass::rms_norm_triton_backward", mutates_args=())
@on_its_device
def rms_norm_backward_op(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, gate: Tensor | None, rstd: Tensor,
    gate_first: bool, sigmoid: bool, group_size: int, unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` as an operator of torch."""
    return backward(
        dy.contiguous(), _contiguous(dsum), x.contiguous(), _contiguous(weight), _contiguous(gate), rstd,
        gate_first, sigmoid, group_size, unit_offset,
    )  # fmt: skip


@rms_norm_backward_op.register_fake
def _(dy, dsum, x, weight, gate, rstd, gate_first, sigmoid, group_size, unit_offset):
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), dgate, x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _keep(ctx, inputs, output):
    x, weight, residual, gate, _, *ctx.flags = inputs
    _, summed, rstd = output
    ctx.residual = residual is not None
    ctx.save_for_backward(summed if ctx.residual else x, weight, gate, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dsum, _):
    x, weight, gate, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dgate, dweight = rms_norm_backward_op(dy, dsum if ctx.residual else None, x, weight, gate, rstd, *ctx.flags)
    gradients = dx, None if weight is None else dweight, dx if ctx.residual else None, None if gate is None else dgate
    return *gradients, None, None, None, None, None


rms_norm_op.register_autograd(_differentiate, setup_context=_keep)
