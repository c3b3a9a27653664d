"""The diagonal recurrence on the GPU: one number of state per channel in a register, tokens one after the other.

    h_t = exp(g_t) h_{t-1} + b_t

Where batch and channels are too few to fill the GPU, time is cut into segments: since a segment multiplies the state by
exp(Σ g), one pass gives what each segment adds, a short loop the states between them, and a second pass the outputs.

The gradient is the same recurrence from the last token to the first, with the decay of the token after:

    G_t = dh_t + exp(g_{t+1}) G_{t+1}        db_t = G_t        dg_t = exp(g_t) h_{t-1} G_t
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.diagonal_scan.tiles import ENOUGH_PROGRAMS, FORWARD, SHORTEST_SEGMENT
from archcompass.kernels.guard import on_its_device


@triton.jit(do_not_specialize=["time", "segments", "length"])
def _diagonal_kernel(
    decay_ptr, input_ptr, first_ptr, out_ptr, last_ptr, total_ptr,
    time, segments, length, channels,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Without out_ptr: only the last state and the sum of g (a segment's share)."""
    segment, row = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    sequence, start = segment // segments, (segment % segments) * length
    end = tl.minimum(start + length, time)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < channels
    place = (segment * ROWS + row) * channels + d
    state = tl.zeros((BLOCK_D,), tl.float32)
    if first_ptr is not None:
        state = tl.load(first_ptr + place, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(start, end):
        token = sequence * time + tl.cast(t, tl.int64)
        at = (token * ROWS + row) * channels + d
        decay = tl.load(decay_ptr + token * channels + d, mask=mask, other=0.0).to(tl.float32)
        state = tl.exp(decay) * state + tl.load(input_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is None:
            total += decay
        else:
            tl.store(out_ptr + at, state, mask=mask)
    tl.store(last_ptr + place, state, mask=mask)
    if total_ptr is not None:
        tl.store(total_ptr + place, total, mask=mask)


def scan(log_decay: Tensor, inputs: Tensor, first: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Launches the recurrence.

    Args:
        log_decay: [batch, time, channels]; inputs: [batch, time, rows, channels].
        first: [batch, rows, channels], float32.
        segments: pieces that time is cut into.

    Returns:
        h like the inputs, and after the last token like `first`; both float32.
    """
    batch, time, rows, channels = inputs.shape
    out, last = inputs.new_empty(inputs.shape, dtype=torch.float32), torch.empty_like(first)
    if not first.numel():
        return out, last
    tile = FORWARD.pick(inputs.device)
    length = ceil_div(time, segments)
    segments = ceil_div(time, length)
    grid = (batch * segments, triton.cdiv(channels, tile.blocks["BLOCK_D"]), rows)
    sizes = (time, segments, length, channels)
    options = {"ROWS": rows, **tile.launch(), "enable_fp_fusion": True}
    if segments > 1:
        added, total = (first.new_empty((batch, segments, rows, channels)) for _ in range(2))
        _diagonal_kernel[grid](log_decay, inputs, None, None, added, total, *sizes, **options)
        first = _between_segments(first, added, total)
        last = torch.empty_like(first)
    _diagonal_kernel[grid](log_decay, inputs, first, out, last, None, *sizes, **options)
    return out, last[:, -1].clone(memory_format=torch.contiguous_format) if segments > 1 else last


def _between_segments(first: Tensor, added: Tensor, total: Tensor) -> Tensor:
    """The state before every segment, [batch, segments, rows, channels]: h <- exp(Σ g) h + what the segment adds."""
    states = [first]
    for n in range(added.shape[1] - 1):
        states.append(torch.addcmul(added[:, n], total[:, n].exp(), states[-1]))
    return torch.stack(states, dim=1)


def segments_for(inputs: Tensor) -> int:
    """Pieces to cut time into, so that there are programs enough."""
    batch, time, rows, channels = inputs.shape
    programs = batch * rows * ceil_div(channels, FORWARD.pick(inputs.device).blocks["BLOCK_D"])
    return max(1, min(time // SHORTEST_SEGMENT, ENOUGH_PROGRAMS // max(programs, 1)))


@torch.library.custom_op("archcompass::diagonal_scan_triton", mutates_args=())
@on_its_device
def diagonal_scan_op(log_decay: Tensor, inputs: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """`scan` as an operator of torch."""
    return scan(log_decay.contiguous(), inputs.contiguous(), first.contiguous(), segments_for(inputs))


@diagonal_scan_op.register_fake
def _(log_decay, inputs, first):
    return inputs.new_empty(inputs.shape, dtype=torch.float32), first.new_empty(first.shape)


def _keep(ctx, inputs, output):
    log_decay, _, first = inputs
    ctx.save_for_backward(log_decay, first, output[0])


def _differentiate(ctx, dout, dlast):
    """The same recurrence backwards in time; what enters at the last token carries the gradient of the last state."""
    log_decay, first, out = ctx.saved_tensors
    after = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], dim=1)
    flipped, _ = diagonal_scan_op(after.flip(1), dout.flip(1), dlast)
    gradient = flipped.flip(1)
    before = torch.cat([first.unsqueeze(1), out[:, :-1]], dim=1)
    kept = log_decay.exp()
    return (gradient * before).sum(2) * kept, gradient, gradient[:, 0] * kept[:, :1]


diagonal_scan_op.register_autograd(_differentiate, setup_context=_keep)


def diagonal_scan_triton(log_decay: Tensor, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence; arguments and results as in `reference`, all float32, the decay always without rows."""
    if inputs.dim() == 4:
        out, last = diagonal_scan_op(log_decay, inputs, state)
        return out, last
    out, last = diagonal_scan_op(log_decay, inputs.unsqueeze(2), state.unsqueeze(1))
    return out.squeeze(2), last.squeeze(1)
