"""What recurrent modules share: hidden padding, the token shift, states, and one call for prompts and single steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from archcompass.blocks.runtime import Context, FixedState
from archcompass.kernels.conv import causal_conv
from archcompass.kernels.delta_rule import delta_rule, delta_rule_step
from archcompass.kernels.linear_attention import linear_attention, linear_attention_step
from archcompass.kernels.norm import rms_norm


@dataclass(slots=True)
class MatrixState(FixedState):
    """recurrent [batch, heads, key_dim, value_dim], float32."""

    recurrent: Tensor


@dataclass(slots=True)
class ConvState(FixedState):
    """conv [batch, taps - 1, channels], oldest first, and recurrent [batch, heads, key_dim, value_dim], float32."""

    conv: Tensor
    recurrent: Tensor


@dataclass(slots=True)
class ShiftState(FixedState):
    """shift [batch, width], the last token seen."""

    shift: Tensor


@dataclass(slots=True)
class ShiftedMatrixState(FixedState):
    """shift [batch, width], the last token seen, and recurrent [batch, heads, key_dim, value_dim], float32."""

    shift: Tensor
    recurrent: Tensor


def keeps(context: Context | None) -> bool:
    """Whether a call is to return a state."""
    return context is None or context.keep_state


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: gates and decays compound over time."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers that the architecture fixes (decays of heads), once per device; an ordinary tensor in inference mode too."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def hide(x: Tensor, context: Context | None) -> Tensor:
    """x [batch, time, ...] with zeros at padding, where nothing may be written or shifted into a real token."""
    real = None if context is None else context.real(x.shape[1], x.device)
    if real is None:
        return x
    return x * real.reshape(*real.shape[:2], *[1] * (x.dim() - 2))


def previous(x: Tensor, last: Tensor | None) -> Tensor:
    """The token before each one: x [batch, time, width] shifted by one, after `last` [batch, width] or zeros."""
    first = torch.zeros_like(x[:, :1]) if last is None else last.to(x.dtype).unsqueeze(1)
    return first if x.shape[1] == 1 else torch.cat([first, x[:, :-1]], dim=1)


def recall(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    *,
    bonus: Tensor | None = None,
    exclusive: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` after `state`; a single token takes the step that overwrites the state instead of copying it."""
    if state is None or q.shape[1] != 1:
        return linear_attention(q, k, v, log_decay, bonus=bonus, exclusive=exclusive, scale=scale, initial_state=state)
    now = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, 0]
    y, state = linear_attention_step(
        q[:, 0], k[:, 0], v[:, 0], now, state=state, bonus=bonus, exclusive=exclusive, scale=scale
    )
    return y.unsqueeze(1), state


def rewrite(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta_rule` after `state`, queries scaled by key_dim^-0.5; a single token overwrites the state."""
    scale = q.shape[-1] ** -0.5
    if state is None or q.shape[1] != 1:
        return delta_rule(q, k, v, beta, log_decay, scale=scale, initial_state=state)
    now = None if log_decay is None else log_decay[:, 0]
    y, state = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], now, state=state, scale=scale)
    return y.unsqueeze(1), state


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x [batch, time, heads, dim] with heads of length one, x / sqrt(|x|² + eps)."""
    dim = x.shape[-1]
    if x.is_cpu and x.shape[1] == 1:  # half of what asking for the norm costs
        squares: Tensor = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True).square()
        return (x * (squares + eps).rsqrt()).to(x.dtype)
    return rms_norm(x, x.new_full((dim,), dim**-0.5), eps / dim)


def short_conv(x: Tensor, weight: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu(conv(x)) for x [batch, time, channels] after the taps - 1 tokens `before`, and the last taps - 1 tokens."""
    return causal_conv(x, weight, activation="silu", initial_state=before)


def start_conv(weight: Tensor) -> None:
    """Fills the taps [channels, taps] uniformly in ±taps^-0.5, torch's start of a depthwise convolution."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def start_decay(a_log: Tensor, dt_bias: Tensor) -> None:
    """A from 1 to 16 and dt log-uniform in [0.001, 0.1], Mamba-2's start, which the delta rules took over."""
    with torch.no_grad():
        a_log.uniform_(1, 16).log_()
        dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


__all__ = [
    "ConvState",
    "MatrixState",
    "ShiftState",
    "ShiftedMatrixState",
    "constant",
    "hide",
    "keeps",
    "previous",
    "recall",
    "rewrite",
    "short_conv",
    "start_conv",
    "start_decay",
    "unit",
    "wide",
]
