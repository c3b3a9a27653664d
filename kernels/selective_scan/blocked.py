"""The selective scan in plain torch: time in blocks, one fused multiply-add per token.

The scan has a decay of its own for every channel and state entry, so no matrix product carries it through time. What can
be saved is everything else: in blocks of BLOCK tokens, factors exp(dt A) and inputs dt x B are made at once, the
recurrence is one in-place `addcmul` per token, and the readout C · h is one product per block. The channel is the
innermost dimension inside, so that every operation runs over whole vectors, and a block's arrays stay in the cache. An
associative scan would do log(T) times the work, and cumulated decays would need each exponential twice.

Gradients are exact: forward keeps the state at each block's start, backward runs a block again and then the recurrence
of the gradients, G_t = C_t dy_t + exp(dt_{t+1} A) G_{t+1}, in reverse. Both are operators of torch.library, so that
compilation, the meta device and FLOP counters see one operation and not a loop.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.decay import LOG2_E

BLOCK = 16


@torch.library.custom_op("archcompass::selective_scan_torch", mutates_args=())
def selective_scan_torch(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + u_t B_t, y_t = C_t · h_t, all in one precision.

    Args:
        u: dt · x, [batch, time, channels].
        dt: likewise.
        A: [channels, N].
        B: [batch, time, N]; C: likewise.
        state: [batch, channels, N].
        keep: whether gradients will be asked for.

    Returns:
        y [batch, time, channels], the last state, and with `keep` the state at each block's start,
        [blocks, batch, N, channels] (else none).
    """
    u_t, dt_t, B_t, C_t = _by_time(u, dt, B, C)
    by_entry = A.t() * LOG2_E
    now = state.transpose(1, 2).contiguous()
    y = torch.empty_like(u)
    starts = []
    for block in _blocks(u.shape[1]):
        if keep:
            starts.append(now)
        _, states = _run_block(u_t[block], dt_t[block], by_entry, B_t[block], now)
        y[:, block] = (C_t[block].mT @ states).squeeze(2).transpose(0, 1)
        now = states[-1].clone()
    kept = torch.stack(starts) if starts else now.new_empty(0, *now.shape)
    return y, _by_channel(now, state), kept


@selective_scan_torch.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, ...]:
    batch, channels, entries = state.shape
    blocks = -(-u.shape[1] // BLOCK) if keep else 0
    return torch.empty_like(u), torch.empty_like(state), state.new_empty(blocks, batch, entries, channels)


@torch.library.custom_op("archcompass::selective_scan_torch_backward", mutates_args=())
def selective_scan_torch_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and the first state, from those of y and of the last state."""
    u_t, dt_t, B_t, C_t = _by_time(u, dt, B, C)
    dy_t = dy.transpose(0, 1).unsqueeze(2)
    by_entry = A.t().contiguous()
    du, ddt, dB, dC = (torch.empty_like(x) for x in (u, dt, B, C))
    dA = torch.zeros_like(by_entry)
    flowing = dlast.transpose(1, 2).contiguous()
    for block, start in zip(reversed(list(_blocks(u.shape[1]))), reversed(starts.unbind(0)), strict=True):
        factors, states = _run_block(u_t[block], dt_t[block], by_entry * LOG2_E, B_t[block], start)
        dC[:, block] = (states @ dy_t[block].mT).squeeze(-1).transpose(0, 1)
        before = torch.cat([start.unsqueeze(0), states[:-1]])
        gradients = C_t[block] * dy_t[block]
        gradients[-1] += flowing
        for t in range(gradients.shape[0] - 2, -1, -1):
            gradients[t].addcmul_(factors[t + 1], gradients[t + 1])
        flowing = factors[0] * gradients[0]
        du[:, block] = (B_t[block].mT @ gradients).squeeze(2).transpose(0, 1)
        dB[:, block] = (gradients @ u_t[block].mT).squeeze(-1).transpose(0, 1)
        of_exponent = before.mul_(factors).mul_(gradients)
        dA += (of_exponent * dt_t[block]).sum((0, 1))
        ddt[:, block] = (of_exponent * by_entry).sum(2).transpose(0, 1)
    return du, ddt, dA.t().contiguous(), dB, dC, flowing.transpose(1, 2).contiguous()


@selective_scan_torch_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, ...]:
    return (*(torch.empty_like(x) for x in (u, dt, A, B, C)), torch.empty_like(dlast))


def _by_time(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Time first, channels last: [time, batch, 1, channels] twice and [time, batch, N, 1] twice."""
    channels = (x.transpose(0, 1).unsqueeze(2) for x in (u, dt))
    entries = (x.transpose(0, 1).unsqueeze(3) for x in (B, C))
    return (*channels, *entries)  # type: ignore[return-value]


def _blocks(time: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, time, BLOCK))


def _run_block(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decay factors and states of every token of a block, both [tokens, batch, N, channels]; A is in base 2."""
    factors = (dt * A).exp2_()
    states = u * B
    for factor, written in zip(factors.unbind(0), states.unbind(0), strict=True):
        state = written.addcmul_(factor, state)
    return factors, states


def _by_channel(state: Tensor, like: Tensor) -> Tensor:
    """A copy in the public layout, [batch, channels, N]."""
    return torch.empty_like(like).copy_(state.transpose(1, 2))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, keep = inputs
    assert keep, "called without keep although gradients are wanted"
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor, dlast: Tensor, dstarts: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, starts = ctx.saved_tensors
    return (*selective_scan_torch_backward(dy.contiguous(), dlast.contiguous(), *inputs, starts), None)


selective_scan_torch.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.archcompass.selective_scan_torch)
def _readout_flops(u: Any, dt: Any, A: Any, *_: Any, **__: Any) -> int:
    """One product per token: every channel's N entries with C."""
    batch, time, channels = u
    return 2 * int(batch * time * channels * A[1])


@register_flop_formula(torch.ops.archcompass.selective_scan_torch_backward)
def _gradient_flops(dy: Any, dlast: Any, *_: Any, **__: Any) -> int:
    """Three products per token: for u, B and C."""
    batch, time, channels = dy
    return 6 * int(batch * time * channels * dlast[2])
