"""The causal depthwise convolution on the GPU: forward and backward, packed sequences, state in and out.

    y_t = act(bias + sum_i w_i x_(t - width + 1 + i))

Memory-bound: the `width` reads of a token come from the cache but for one. The tokens before a sequence's first are
read from the state that came with it. The backward pass computes the sum again; gradients of weight and bias are summed
over a program's tokens in registers, written as partial sums, and added up by torch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.conv.op import conv_flops
from archcompass.kernels.conv.tiles import BACKWARD, FORWARD, TILES_PER_PROGRAM
from archcompass.kernels.guard import on_its_device


@triton.jit
def _piece(cu_ptr, place_ptr, time, pieces):
    """Sequence of a program and number of its piece in it; first row and length of the sequence."""
    program = tl.program_id(0)
    if cu_ptr is None:
        sequence, number = program // pieces, program % pieces
        start = sequence.to(tl.int64) * time
        length = time
    else:
        sequence, number = tl.load(place_ptr + 2 * program), tl.load(place_ptr + 2 * program + 1)
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_ptr + sequence + 1) - start).to(tl.int32)
    return sequence, number, start, length


@triton.jit
def _seen(x_ptr, before_ptr, sequence, start, length, t, c, channels, WIDTH: tl.constexpr):
    """Tokens t of a sequence, where t below 0 is the state before it; zeros after its end."""
    known = (c < channels)[None, :]
    now = tl.load(
        x_ptr + (start + t)[:, None] * channels + c[None, :],
        mask=known & (t >= 0)[:, None] & (t < length)[:, None],
        other=0.0,
    ).to(tl.float32)
    past = tl.load(
        before_ptr + (sequence.to(tl.int64) * (WIDTH - 1) + WIDTH - 1 + t)[:, None] * channels + c[None, :],
        mask=known & (t < 0)[:, None] & (t > -WIDTH)[:, None],
        other=0.0,
    ).to(tl.float32)
    return now + past


@triton.jit
def _tap(weight_ptr, c, channels, i, WIDTH: tl.constexpr):
    return tl.load(weight_ptr + c * WIDTH + i, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["time", "pieces"])
def _conv_forward_kernel(
    x_ptr, before_ptr, weight_ptr, bias_ptr, dy_ptr, out_ptr, cu_ptr, place_ptr, time, pieces, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The output; given its gradient, instead that of the sum before the activation."""
    sequence, number, start, length = _piece(cu_ptr, place_ptr, time, pieces)
    t = number * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(WIDTH):
        x = _seen(x_ptr, before_ptr, sequence, start, length, t - (WIDTH - 1 - i), c, channels, WIDTH)
        y += x * _tap(weight_ptr, c, channels, i, WIDTH)[None, :]
    inside = (t < length)[:, None] & (c < channels)[None, :]
    at = (start + t)[:, None] * channels + c[None, :]
    if dy_ptr is not None:
        gate = tl.sigmoid(y)
        y = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * gate * (1.0 + y * (1.0 - gate))
    elif SILU:
        y *= tl.sigmoid(y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["time", "pieces", "tiles"])
def _conv_backward_kernel(
    slope_ptr, x_ptr, before_ptr, weight_ptr, dx_ptr, dbefore_ptr, dweight_ptr, dbias_ptr, cu_ptr, place_ptr,
    time, pieces, channels, tiles,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients at tokens t, of the state too where t is below 0; partial sums for weight and bias."""
    sequence, number, start, length = _piece(cu_ptr, place_ptr, time, pieces)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = (c < channels)[None, :]
    tap = tl.arange(0, TAPS)
    dweight = tl.zeros((TAPS, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        t = (number * tiles + tile) * BLOCK_T - (WIDTH - 1) + tl.arange(0, BLOCK_T)
        dx = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        x = _seen(x_ptr, before_ptr, sequence, start, length, t, c, channels, WIDTH)
        for i in tl.static_range(WIDTH):
            met = t + WIDTH - 1 - i  # the output at which token t meets tap i
            slope = tl.load(
                slope_ptr + (start + met)[:, None] * channels + c[None, :],
                mask=known & ((met >= 0) & (met < length))[:, None],
                other=0.0,
            ).to(tl.float32)
            dx += slope * _tap(weight_ptr, c, channels, i, WIDTH)[None, :]
            dweight += tl.where((tap == i)[:, None], tl.sum(slope * x, axis=0)[None, :], 0.0)
            if i == WIDTH - 1:
                dbias += tl.sum(tl.where((t >= 0)[:, None], slope, 0.0), axis=0)
        now = known & ((t >= 0) & (t < length))[:, None]
        tl.store(dx_ptr + (start + t)[:, None] * channels + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=now)
        at = (sequence.to(tl.int64) * (WIDTH - 1) + WIDTH - 1 + t)[:, None] * channels + c[None, :]
        tl.store(dbefore_ptr + at, dx.to(dbefore_ptr.dtype.element_ty), mask=known & (t < 0)[:, None])
    program = tl.program_id(0).to(tl.int64)
    at = (program * WIDTH + tap[:, None]) * channels + c[None, :]
    tl.store(dweight_ptr + at, dweight, mask=(tap < WIDTH)[:, None] & known)
    tl.store(dbias_ptr + program * channels + c, dbias, mask=c < channels)


class _Pieces(NamedTuple):
    """How the sequences are cut, a program for each piece.

    programs: pieces of all sequences together; of packed ones, at least as many as there are.
    each: pieces of every sequence of a batch.
    cu_seqlens, place: of packed sequences, int32: their boundaries, and for each piece its sequence and number.
    """

    programs: int
    each: int
    cu_seqlens: Tensor | None
    place: Tensor | None


def _cut(x: Tensor, cu_seqlens: Tensor | None, size: int, more: int = 0) -> _Pieces:
    """Cuts sequences that are `more` tokens longer than they are into pieces of `size`. Reads no value on the host."""
    batch, time, _ = x.shape
    if cu_seqlens is None:
        each = triton.cdiv(time + more, size)
        return _Pieces(batch * each, each, None, None)
    cu_seqlens = cu_seqlens.to(x.device, torch.int32).contiguous()
    sequences = cu_seqlens.numel() - 1
    programs = time // size + sequences * (1 + triton.cdiv(more, size))
    ends = ((cu_seqlens.diff() + (more + size - 1)) // size).cumsum(0)
    piece = torch.arange(programs, device=x.device)
    sequence = torch.searchsorted(ends, piece, right=True).clamp(max=sequences - 1)
    first = torch.cat([ends.new_zeros(1), ends[:-1]])[sequence]
    return _Pieces(programs, 0, cu_seqlens, torch.stack([sequence, piece - first], dim=1).to(torch.int32))


def forward(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
    dy: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward kernel on contiguous tensors.

    Returns:
        outputs like x; given their gradient `dy` (with SiLU only), that of the sum before the activation, float32.
    """
    out = torch.empty_like(x, dtype=x.dtype if dy is None else torch.float32)
    _, time, channels = x.shape
    tile = FORWARD.pick(x.device)
    if x.numel() and before.shape[0]:
        cut = _cut(x, cu_seqlens, tile.blocks["BLOCK_T"])
        _conv_forward_kernel[(cut.programs, triton.cdiv(channels, tile.blocks["BLOCK_C"]))](
            x, before, weight, bias, dy, out, cut.cu_seqlens, cut.place, time, cut.each, channels,
            WIDTH=weight.shape[1], SILU=silu, **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def backward(
    dy: Tensor, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward kernels on contiguous tensors; returns gradients of x, `before`, weight and bias."""
    width = weight.shape[1]
    _, time, channels = x.shape
    if not x.numel() or not before.shape[0]:
        return torch.zeros_like(x), torch.zeros_like(before), torch.zeros_like(weight), weight.new_zeros(channels)
    slope = forward(x, before, weight, bias, cu_seqlens, True, dy) if silu else dy
    tile = BACKWARD.pick(x.device)
    tiles = min(triton.cdiv(time + width - 1, tile.blocks["BLOCK_T"]), TILES_PER_PROGRAM)
    cut = _cut(x, cu_seqlens, tiles * tile.blocks["BLOCK_T"], width - 1)
    dx, dbefore = torch.empty_like(x), torch.empty_like(before)
    dweight = x.new_empty((cut.programs, width, channels), dtype=torch.float32)
    dbias = x.new_empty((cut.programs, channels), dtype=torch.float32)
    _conv_backward_kernel[(cut.programs, triton.cdiv(channels, tile.blocks["BLOCK_C"]))](
        slope, x, before, weight, dx, dbefore, dweight, dbias, cut.cu_seqlens, cut.place,
        time, cut.each, channels, tiles,
        WIDTH=width, TAPS=triton.next_power_of_2(width), **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return dx, dbefore, dweight.sum(0).t().to(weight.dtype), dbias.sum(0).to(weight.dtype)


@torch.library.custom_op("archcompass::causal_conv_triton", mutates_args=())
@on_its_device
def causal_conv_triton_op(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """`forward` as an operator of torch."""
    bias = None if bias is None else bias.contiguous()
    return forward(x.contiguous(), before.contiguous(), weight.contiguous(), bias, cu_seqlens, silu)


@causal_conv_triton_op.register_fake
def _(x, before, weight, bias, cu_seqlens, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("archcompass::causal_conv_triton_backward", mutates_args=())
@on_its_device
def causal_conv_triton_backward_op(
    dy: Tensor, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` as an operator of torch."""
    bias = None if bias is None else bias.contiguous()
    dx, dbefore, dweight, dbias = backward(
        dy.contiguous(), x.contiguous(), before.contiguous(), weight.contiguous(), bias, cu_seqlens, silu
    )
    return dx, dbefore, dweight.contiguous(), dbias


@causal_conv_triton_backward_op.register_fake
def _(dy, x, before, weight, bias, cu_seqlens, silu):
    dweight = weight.new_empty(weight.shape)
    return x.new_empty(x.shape), before.new_empty(before.shape), dweight, weight.new_empty(weight.shape[0])


def _keep(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    bias = ctx.saved_tensors[3]
    dx, dbefore, dweight, dbias = causal_conv_triton_backward_op(dy, *ctx.saved_tensors, ctx.silu)
    return dx, dbefore, dweight, None if bias is None else dbias, None, None


causal_conv_triton_op.register_autograd(_differentiate, setup_context=_keep)
torch.utils.flop_counter.register_flop_formula(torch.ops.archcompass.causal_conv_triton)(conv_flops)
