"""The diagonal linear recurrence in about two square roots of the time: the path for CPUs, and GPUs without Triton.

The sequence is cut into chunks of about sqrt(time) tokens. All chunks run side by side from a state of zero, one token
of each at a time; then the states pass from chunk to chunk; then every token adds what its chunk began with,

    h_i = local_i + exp(g_1 + ... + g_i) h_0.

No exponent is positive where the decays are not, so nothing overflows.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.kernels.decay import SMALLEST_EXPONENT


def chunked(log_decay: Tensor, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the recurrence; arguments and results as in `reference`."""
    time = inputs.shape[1]
    if time == 1:
        state = torch.addcmul(inputs[:, 0], _exp(log_decay[:, 0]), state)
        return state.unsqueeze(1), state
    size = math.isqrt(time - 1) + 1
    padding = -time % size
    if padding:
        log_decay, inputs = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) for x in (log_decay, inputs))
    log_decay, inputs = (x.unflatten(1, (-1, size)) for x in (log_decay, inputs))  # [batch, chunks, C, ..., channels]
    local = _from_zero(_exp(log_decay), inputs)
    kept = _exp(log_decay.cumsum(dim=2))
    before, state = _pass_state(kept[:, :, -1], local[:, :, -1], state)
    return torch.addcmul(local, kept, before.unsqueeze(2)).flatten(1, 2)[:, :time], state


def _from_zero(forget: Tensor, inputs: Tensor) -> Tensor:
    """Every chunk by itself, [batch, chunks, C, ..., channels]."""
    state = inputs[:, :, 0]
    seen = [state]
    for i in range(1, inputs.shape[2]):
        state = torch.addcmul(inputs[:, :, i], forget[:, :, i], state)
        seen.append(state)
    return torch.stack(seen, dim=2)


def _pass_state(kept: Tensor, written: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [batch, chunks, ..., channels], and after the last."""
    before = []
    for n in range(written.shape[1]):
        before.append(state)
        state = torch.addcmul(written[:, n], kept[:, n], state)
    return torch.stack(before, dim=1), state


def _exp(x: Tensor) -> Tensor:
    """e^x, and exactly zero where that is too small to matter."""
    return F.threshold(x, SMALLEST_EXPONENT[x.dtype], -torch.inf).exp_()
