"""The selective scan on the GPU: the state of a few channels in registers, tokens one after the other.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t · h_t

Nothing of size channels x N x time is ever written. Where batch and channels are too few to fill the GPU, time is cut
into segments: since a segment multiplies the state by exp(A Σ dt), one pass gives what each segment adds, a short loop
the states between them, and a second pass the outputs; the exponentials are paid twice. For inference the skip D x and
the gate are part of the kernel.

Backward keeps the state every KEEP_EVERY tokens, runs each block again into a scratch area, and then the recurrence of
the gradients in reverse, in the same segments and by the same three steps. Sums over channels (dB, dC) go through
partial sums, one per tile of channels, so results do not depend on the order of atomics.
"""

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.guard import on_its_device
from archcompass.kernels.selective_scan.tiles import (
    BACKWARD,
    ENOUGH_PROGRAMS,
    FORWARD,
    KEEP_EVERY,
    SHORTEST_SEGMENT,
    STEP,
)
from archcompass.kernels.tiles import Table, next_power_of_two


@triton.jit
def _scan_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, gate_ptr, first_ptr, bounds_ptr,
    y_ptr, last_ptr, total_ptr, kept_ptr, kept_bounds_ptr,
    channels,
    N: tl.constexpr, KEEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Without y_ptr: only the last state and the sum of dt (a segment's share). With kept_ptr: states on the way."""
    sequence = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    mask = in_d[:, None] & in_n[None, :]
    entry = d[:, None] * N + n[None, :]
    a = tl.load(a_ptr + entry, mask=mask, other=0.0)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if first_ptr is not None:
        state = tl.load(first_ptr + sequence * channels * N + entry, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if d_ptr is not None:
        skip = tl.load(d_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    start, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    for t in range(start, end):
        token = tl.cast(t, tl.int64)
        if kept_ptr is not None:
            since = t - start
            if since % KEEP == 0:
                slot = tl.load(kept_bounds_ptr + sequence) + since // KEEP
                tl.store(kept_ptr + tl.cast(slot, tl.int64) * channels * N + entry, state, mask=mask)
        x = tl.load(x_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + token * N + n, mask=in_n, other=0.0).to(tl.float32)
        state = tl.exp(dt[:, None] * a) * state + (dt * x)[:, None] * b[None, :]
        if y_ptr is None:
            total += dt
        else:
            c = tl.load(c_ptr + token * N + n, mask=in_n, other=0.0).to(tl.float32)
            y = tl.sum(state * c[None, :], axis=1)
            if d_ptr is not None:
                y += skip * x
            if gate_ptr is not None:
                z = tl.load(gate_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
                y *= z * tl.sigmoid(z)
            tl.store(y_ptr + token * channels + d, y.to(y_ptr.dtype.element_ty), mask=in_d)
    tl.store(last_ptr + sequence * channels * N + entry, state, mask=mask)
    if total_ptr is not None:
        tl.store(total_ptr + sequence * channels + d, total, mask=in_d)


@triton.jit
def _gradient_share_kernel(
    dt_ptr, a_ptr, c_ptr, dy_ptr, bounds_ptr, share_ptr, total_ptr, channels,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, as far as the segment itself makes it, and the sum of dt."""
    sequence = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    mask = in_d[:, None] & in_n[None, :]
    entry = d[:, None] * N + n[None, :]
    a = tl.load(a_ptr + entry, mask=mask, other=0.0)
    gradient = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    start, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    for back in range(end - start):
        token = tl.cast(end - 1 - back, tl.int64)
        dt = tl.load(dt_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + token * N + n, mask=in_n, other=0.0).to(tl.float32)
        gradient = tl.exp(dt[:, None] * a) * (gradient + dy[:, None] * c[None, :])
        total += dt
    tl.store(share_ptr + sequence * channels * N + entry, gradient, mask=mask)
    tl.store(total_ptr + sequence * channels + d, total, mask=in_d)


@triton.jit(do_not_specialize=["tokens"])
def _scan_backward_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, bounds_ptr, kept_ptr, kept_bounds_ptr, dy_ptr, dlast_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, da_ptr, db_ptr, dc_ptr, dfirst_ptr,
    channels, tokens,
    N: tl.constexpr, KEEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n = tile * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    mask = in_d[:, None] & in_n[None, :]
    entry = d[:, None] * N + n[None, :]
    lane = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    scratch = scratch_ptr + (sequence * tl.num_programs(1) + tile) * KEEP * BLOCK_D * BLOCK_N + lane
    a = tl.load(a_ptr + entry, mask=mask, other=0.0)
    da = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    gradient = tl.load(dlast_ptr + sequence * channels * N + entry, mask=mask, other=0.0)
    start, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    first_slot = tl.load(kept_bounds_ptr + sequence)
    blocks = tl.cdiv(end - start, KEEP)
    for back in range(blocks):
        block = tl.cast(blocks - 1 - back, tl.int64)
        begin = start + block * KEEP
        length = tl.minimum(end - begin, KEEP)
        state = tl.load(kept_ptr + (first_slot + block) * channels * N + entry, mask=mask, other=0.0)
        for i in range(length):
            token = begin + i
            tl.store(scratch + i * BLOCK_D * BLOCK_N, state)
            x = tl.load(x_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + token * N + n, mask=in_n, other=0.0).to(tl.float32)
            state = tl.exp(dt[:, None] * a) * state + (dt * x)[:, None] * b[None, :]
        tl.debug_barrier()
        for i in range(length):
            place = length - 1 - i
            token = begin + place
            before = tl.load(scratch + place * BLOCK_D * BLOCK_N)
            x = tl.load(x_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + token * N + n, mask=in_n, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + token * N + n, mask=in_n, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
            u, factor = dt * x, tl.exp(dt[:, None] * a)
            after = factor * before + u[:, None] * b[None, :]
            gradient += dy[:, None] * c[None, :]
            partial = (tile * tokens + token) * N + n
            tl.store(dc_ptr + partial, tl.sum(after * dy[:, None], axis=0), mask=in_n)
            tl.store(db_ptr + partial, tl.sum(gradient * u[:, None], axis=0), mask=in_n)
            du = tl.sum(gradient * b[None, :], axis=1)
            gradient *= factor
            of_exponent = gradient * before
            da += of_exponent * dt[:, None]
            ddt = du * x + tl.sum(of_exponent * a, axis=1)
            tl.store(dx_ptr + token * channels + d, (du * dt).to(dx_ptr.dtype.element_ty), mask=in_d)
            tl.store(ddt_ptr + token * channels + d, ddt.to(ddt_ptr.dtype.element_ty), mask=in_d)
        tl.debug_barrier()
    tl.store(da_ptr + sequence * channels * N + entry, da, mask=mask)
    tl.store(dfirst_ptr + sequence * channels * N + entry, gradient, mask=mask)


@triton.jit
def _scan_step_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, gate_ptr, state_ptr, y_ptr, channels,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    mask = in_d[:, None] & in_n[None, :]
    entry = d[:, None] * N + n[None, :]
    at = sequence * channels + d
    a = tl.load(a_ptr + entry, mask=mask, other=0.0).to(tl.float32)
    state = tl.load(state_ptr + sequence * channels * N + entry, mask=mask, other=0.0)
    x = tl.load(x_ptr + at, mask=in_d, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + at, mask=in_d, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + sequence * N + n, mask=in_n, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + sequence * N + n, mask=in_n, other=0.0).to(tl.float32)
    state = tl.exp(dt[:, None] * a) * state + (dt * x)[:, None] * b[None, :]
    tl.store(state_ptr + sequence * channels * N + entry, state, mask=mask)
    y = tl.sum(state * c[None, :], axis=1)
    if d_ptr is not None:
        y += tl.load(d_ptr + d, mask=in_d, other=0.0).to(tl.float32) * x
    if gate_ptr is not None:
        z = tl.load(gate_ptr + at, mask=in_d, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=in_d)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, gate: Tensor | None,
    first: Tensor, bounds: Tensor, kept_bounds: Tensor | None, slots: int, segments: int, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the scan.

    Args:
        x, dt, gate: [tokens, channels]; B, C: [tokens, N]; A: [channels, N] float32; D: [channels].
        first: [sequences, channels, N], float32.
        bounds: tokens of each sequence, [sequences * segments + 1], int64.
        kept_bounds: first slot of each segment among the kept states, [sequences * segments + 1], or None to keep none.
        slots: how many states are kept.
        segments: pieces of equal number that `bounds` cuts every sequence into.

    Returns:
        y [tokens, channels], the last states, and the kept states [slots, channels, N].
    """
    tokens, channels = x.shape
    entries = A.shape[1]
    y, last = x.new_empty((tokens, channels), dtype=y_dtype), torch.empty_like(first)
    kept = first.new_empty((slots, channels, entries))
    tile = FORWARD.pick(x.device, entries=entries)
    options = {"N": entries, "KEEP": KEEP_EVERY, "BLOCK_N": next_power_of_two(entries), **tile.launch()}
    grid = (len(bounds) - 1, triton.cdiv(channels, tile.blocks["BLOCK_D"]))
    if not first.numel():
        return y, last, kept
    if segments > 1:
        added, total = _room_for_shares(first, segments)
        _scan_kernel[grid](
            x, dt, A, B, None, None, None, None, bounds, None, added, total, None, None, channels, **options,
            enable_fp_fusion=True,
        )  # fmt: skip
        first = _between_segments(first, added, total, A).flatten(0, 1)
        last = torch.empty_like(first)
    _scan_kernel[grid](
        x, dt, A, B, C, D, gate, first, bounds, y, last, None, None if kept_bounds is None else kept, kept_bounds,
        channels, **options, enable_fp_fusion=True,
    )  # fmt: skip
    return (
        y,
        last[segments - 1 :: segments].clone(memory_format=torch.contiguous_format) if segments > 1 else last,
        kept,
    )


def _room_for_shares(first: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """For what every segment of every sequence adds to the state, and for its sum of dt."""
    batch, channels, entries = first.shape
    return first.new_empty((batch, segments, channels, entries)), first.new_empty((batch, segments, channels))


def _between_segments(first: Tensor, added: Tensor, total: Tensor, A: Tensor) -> Tensor:
    """The state before every segment, [batch, segments, channels, N]: h <- exp(A Σ dt) h + what the segment adds."""
    states = [first]
    for n in range(added.shape[1] - 1):
        states.append(torch.addcmul(added[:, n], (total[:, n].unsqueeze(-1) * A).exp(), states[-1]))
    return torch.stack(states, dim=1)


def scan_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bounds: Tensor, kept: Tensor, kept_bounds: Tensor,
    dy: Tensor, dlast: Tensor, segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the reverse scan, segments as `scan` had them: gradients of x, dt, A, B, C and the first states."""
    (tokens, channels), entries, sequences = x.shape, A.shape[1], len(bounds) - 1
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    if not dlast.numel():
        return dx, ddt, torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C), torch.empty_like(dlast)
    tile = BACKWARD.pick(x.device, entries=entries)
    tiles, block_n = triton.cdiv(channels, tile.blocks["BLOCK_D"]), next_power_of_two(entries)
    options = {"N": entries, "BLOCK_N": block_n, **tile.launch(), "enable_fp_fusion": True}
    if segments > 1:
        share, total = _room_for_shares(dlast, segments)
        _gradient_share_kernel[(sequences, tiles)](dt, A, C, dy, bounds, share, total, channels, **options)
        dlast = _between_segments(dlast, share.flip(1), total.flip(1), A).flip(1).flatten(0, 1)
    dfirst, dA = torch.empty_like(dlast), torch.empty_like(dlast)
    dB, dC = (dlast.new_empty((tiles, tokens, entries)) for _ in range(2))
    scratch = dlast.new_empty((sequences * tiles, KEEP_EVERY, tile.blocks["BLOCK_D"], block_n))
    _scan_backward_kernel[(sequences, tiles)](
        x, dt, A, B, C, bounds, kept, kept_bounds, dy, dlast, scratch, dx, ddt, dA, dB, dC, dfirst,
        channels, tokens, KEEP=KEEP_EVERY, **options,
    )  # fmt: skip
    dfirst = dfirst[::segments].clone(memory_format=torch.contiguous_format) if segments > 1 else dfirst
    return dx, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dfirst


@torch.library.custom_op("archcompass::selective_scan_triton", mutates_args=())
@on_its_device
def selective_scan_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, gate: Tensor | None,
    first: Tensor, bounds: Tensor, kept_bounds: Tensor | None, slots: int, segments: int, precise: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`scan` as an operator of torch; y is float32 when `precise`, else like x."""
    D, gate = (None if tensor is None else tensor.contiguous() for tensor in (D, gate))
    x, dt, B, C = (tensor.contiguous() for tensor in (x, dt, B, C))
    y_dtype = torch.float32 if precise else x.dtype
    return scan(
        x, dt, A.contiguous(), B, C, D, gate, first.contiguous(), bounds, kept_bounds, slots, segments, y_dtype
    )  # fmt: skip


@selective_scan_op.register_fake
def _(x, dt, A, B, C, D, gate, first, bounds, kept_bounds, slots, segments, precise):
    y = x.new_empty(x.shape, dtype=torch.float32 if precise else x.dtype)
    return y, first.new_empty(first.shape), first.new_empty((slots, *first.shape[1:]))


@torch.library.custom_op("archcompass::selective_scan_triton_backward", mutates_args=())
@on_its_device
def selective_scan_backward_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bounds: Tensor, kept: Tensor, kept_bounds: Tensor,
    dy: Tensor, dlast: Tensor, segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`scan_backward` as an operator of torch."""
    x, dt, A, B, C, dy, dlast = (tensor.contiguous() for tensor in (x, dt, A, B, C, dy, dlast))
    return scan_backward(x, dt, A, B, C, bounds, kept, kept_bounds, dy, dlast, segments)


@selective_scan_backward_op.register_fake
def _(x, dt, A, B, C, bounds, kept, kept_bounds, dy, dlast, segments):
    return *(tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C)), dlast.new_empty(dlast.shape)


@torch.library.custom_op("archcompass::selective_scan_step_triton", mutates_args={"state"})
@on_its_device
def selective_scan_step_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, gate: Tensor | None, state: Tensor
) -> Tensor:
    """Launches a step: shapes as in `selective_scan_step`; the float32 state is overwritten. No gradients."""
    batch, channels = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = STEP.pick(x.device, entries=A.shape[1])
    if y.numel():
        _scan_step_kernel[(batch, triton.cdiv(channels, tile.blocks["BLOCK_D"]))](
            *(None if tensor is None else tensor.contiguous() for tensor in (x, dt, A, B, C, D, gate)), state, y,
            channels, N=A.shape[1], BLOCK_N=next_power_of_two(A.shape[1]), **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return y


@selective_scan_step_op.register_fake
def _(x, dt, A, B, C, D, gate, state):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output):
    x, dt, A, B, C, _, _, _, bounds, kept_bounds, _, ctx.segments, _ = inputs
    ctx.save_for_backward(x, dt, A, B, C, bounds, output[2], kept_bounds)


def _differentiate(ctx, dy, dlast, _):
    x, dt, A, B, C, bounds, kept, kept_bounds = ctx.saved_tensors
    *gradients, dfirst = selective_scan_backward_op(x, dt, A, B, C, bounds, kept, kept_bounds, dy, dlast, ctx.segments)
    return *gradients, None, None, dfirst, None, None, None, None, None


selective_scan_op.register_autograd(_differentiate, setup_context=_keep)


def selective_scan_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, gate: Tensor | None, state: Tensor,
    spans: list[tuple[int, int]] | None, *, train: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan over a batch, or over packed sequences where `spans` says where they lie.

    With `train`, y is float32, before skip and gate, which the caller applies; D and the gate must then be None.
    """
    segments = 1 if spans is not None else _segments(x, A, BACKWARD if train else FORWARD)
    bounds, slots, kept = _token_table(x, segments) if spans is None else _packed_table(spans, x.device)
    y, last, _ = selective_scan_op(
        *(tensor.flatten(0, 1) for tensor in (x, dt)), A.float(), *(tensor.flatten(0, 1) for tensor in (B, C)),
        D, None if gate is None else gate.flatten(0, 1), state, bounds,
        slots if train else None, kept if train else 0, segments, train,
    )  # fmt: skip
    return y.view(x.shape), last


def _token_table(x: Tensor, segments: int) -> tuple[Tensor, Tensor, int]:
    """For a batch: tokens of each segment, their first kept states, and how many are kept. Made on the device.

    Segments are whole blocks of KEEP_EVERY tokens; the last of a sequence has what is left, maybe nothing.
    """
    batch, time, _ = x.shape
    blocks = ceil_div(ceil_div(time, segments), KEEP_EVERY)
    segment = torch.arange(batch * segments + 1, device=x.device)
    bounds = segment // segments * time + (segment % segments * blocks * KEEP_EVERY).clamp(max=time)
    return bounds, (segment * blocks).to(torch.int32), batch * segments * blocks


def _packed_table(spans: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The same for packed sequences."""
    slots = [0, *accumulate(ceil_div(end - start, KEEP_EVERY) for start, end in spans)]
    bounds = torch.tensor([0, *(end for _, end in spans)], dtype=torch.int64, device=device)
    return bounds, torch.tensor(slots, dtype=torch.int32, device=device), slots[-1]


def _segments(x: Tensor, A: Tensor, table: Table) -> int:
    """Pieces to cut each sequence into, so that there are programs enough."""
    batch, time, channels = x.shape
    tiles = ceil_div(channels, table.pick(x.device, entries=A.shape[1]).blocks["BLOCK_D"])
    return max(1, min(time // SHORTEST_SEGMENT, ENOUGH_PROGRAMS // max(batch * tiles, 1)))


@register_flop_formula(torch.ops.archcompass.selective_scan_triton)
def _readout_flops(x: Any, dt: Any, A: Any, *_: Any, **__: Any) -> int:
    """One product per token: every channel's N entries with C, as `cost.py` counts."""
    return 2 * int(x[0] * x[1] * A[1])


@register_flop_formula(torch.ops.archcompass.selective_scan_triton_backward)
def _gradient_flops(x: Any, dt: Any, A: Any, *_: Any, **__: Any) -> int:
    """Three products per token: for x, B and C."""
    return 6 * int(x[0] * x[1] * A[1])
