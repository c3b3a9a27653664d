"""RWKV-7 at work. One forward serves prompts, further segments and single steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear, at_once
from archcompass.blocks.rwkv7.spec import RWKV7ChannelMix, RWKV7TimeMix
from archcompass.blocks.time_mixing import ShiftedMatrixState, ShiftState, hide, keeps, previous, wide
from archcompass.kernels.delta_rule import dplr, dplr_step
from archcompass.kernels.linear import linear

FIRST_VALUES = "rwkv7_first_values"
STRONGEST = -math.exp(-0.5)  # log decay, at a sigmoid of one


class LowRank(nn.Module):
    """x -> base + up act(down x), with down [rank, width] and up [width, rank]; the base is optional."""

    def __init__(self, width: int, rank: int, *, base: bool = True) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.empty(width, rank))
        self.base = nn.Parameter(torch.empty(width)) if base else None

    def start(self, base: float | Tensor) -> None:
        """Down at zero, so that only the base speaks at first."""
        nn.init.zeros_(self.down)
        nn.init.uniform_(self.up, -0.01, 0.01)
        if self.base is not None:
            with torch.no_grad():
                self.base.copy_(torch.as_tensor(base))

    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        times = linear if x.dtype == torch.bfloat16 else F.linear  # `linear` gains nothing at so few columns in float32
        low = times(x, self.down)
        return times(low if act is None else act(low), self.up, self.base)


class RWKV7TimeMixModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The rows of `mix` are μ of r, k, v, w, a, g."""

    spec: RWKV7TimeMix

    def __init__(self, spec: RWKV7TimeMix, width: int) -> None:
        super().__init__(spec, width)
        self.mix = nn.Parameter(torch.empty(6, width))
        self.receptance, self.key, self.value = (Linear(width, width) for _ in range(3))
        self.decay = LowRank(width, spec.decay_low_rank_dim)
        self.rate = LowRank(width, spec.a_low_rank_dim)
        self.residual = None if spec.first else LowRank(width, spec.v_low_rank_dim)
        self.gate = LowRank(width, spec.gate_low_rank_dim, base=False)
        self.removal = nn.Parameter(torch.empty(width))
        self.replacement = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(width // spec.head_dim, spec.head_dim))
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.output = Linear(width, width)

    def reset_parameters(self) -> None:
        """Shares of the token before that fall over the channels, decays from slow to fast, no low-rank part yet."""
        ramp = torch.linspace(0, 1, self.width)
        with torch.no_grad():
            self.mix.copy_((1 - ramp).expand(6, -1))
        self.decay.start(-6 + 5 * ramp**0.8)
        self.rate.start(0.0)
        self.gate.start(0.0)
        if self.residual is not None:
            self.residual.start(1.0)
        nn.init.constant_(self.removal, 0.85)
        for ones in (self.replacement, self.norm_weight):
            nn.init.ones_(ones)
        for zeros in (self.bonus, self.norm_bias):
            nn.init.zeros_(zeros)

    def read_together(self) -> tuple[tuple[Linear, ...]]:
        return ((self.receptance, self.key, self.value),)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, ShiftedMatrixState) else None
        x = hide(x, context)
        shifted = previous(x, None if before is None else before.shift)
        mixed = torch.lerp(x, shifted, self.mix.view(6, 1, 1, -1))
        _, _, xv, xw, xa, xg = mixed.unbind()
        r, k, v = at_once(*self.read_together(), mixed[:3])
        v = self._mix_values(v, xv, context)
        log_decay = STRONGEST * wide(self.decay(xw, torch.tanh)).sigmoid()
        rate = self.rate(xa).sigmoid()
        by_head = (*x.shape[:2], *self.bonus.shape)
        removed = (k * self.removal).view(by_head)
        removed = removed / torch.linalg.vector_norm(removed, dim=-1, keepdim=True).clamp_min(1e-12)
        k = torch.lerp(k, k * rate, self.replacement)
        r, k, v, rate, log_decay = (part.view(by_head) for part in (r, k, v, rate, log_decay))
        y, recurrent = self._recur(r, k, v, -removed, removed * rate, log_decay, before)
        y = torch.addcmul(self._normalise(y), (r * k * self.bonus).sum(dim=-1, keepdim=True), v)
        y = self.output(y.flatten(2) * self.gate(xg, torch.sigmoid))
        return y, ShiftedMatrixState(x[:, -1].clone(), recurrent) if keeps(context) else None

    def _mix_values(self, v: Tensor, xv: Tensor, context: Context | None) -> Tensor:
        """Values drawn towards the first layer's; where none has left any, towards zero."""
        shared = {} if context is None else context.shared
        if self.residual is None:
            shared[FIRST_VALUES] = v
            return v
        first = shared[FIRST_VALUES] if FIRST_VALUES in shared else torch.zeros_like(v)
        return torch.lerp(v, first, self.residual(xv).sigmoid())

    def _recur(
        self, r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor, before: ShiftedMatrixState | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence; a single token overwrites the state instead of copying it."""
        if before is None or r.shape[1] != 1:
            return dplr(r, k, v, a, b, w, initial_state=None if before is None else before.recurrent)
        now = (part.squeeze(1) for part in (r, k, v, a, b, w))
        y, recurrent = dplr_step(*now, state=before.recurrent)
        return y.unsqueeze(1), recurrent

    def _normalise(self, y: Tensor) -> Tensor:
        """Every head of y [batch, time, heads, head_dim] to mean zero and variance one."""
        flat = y.reshape(-1, self.width)
        return torch.group_norm(flat, y.shape[2], self.norm_weight, self.norm_bias, self.spec.norm_eps).view(y.shape)


class RWKV7ChannelMixModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]."""

    def __init__(self, spec: RWKV7ChannelMix, width: int) -> None:
        super().__init__(spec, width)
        self.mix = nn.Parameter(torch.empty(width))
        self.key = Linear(width, spec.intermediate_size)
        self.value = Linear(spec.intermediate_size, width)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.mix.copy_(1 - torch.linspace(0, 1, self.width) ** 4)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        x = hide(x, context)
        shifted = previous(x, state.shift if isinstance(state, ShiftState) else None)
        y = self.value(F.relu(self.key(torch.lerp(x, shifted, self.mix))).square())
        return y, ShiftState(x[:, -1].clone()) if keeps(context) else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an RWKV-7 spec."""
    if isinstance(spec, RWKV7TimeMix):
        return RWKV7TimeMixModule(spec, width)
    assert isinstance(spec, RWKV7ChannelMix)
    return RWKV7ChannelMixModule(spec, width)
