"""RWKV-6 at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear, at_once
from archcompass.blocks.rwkv4.module import ChannelMixModule
from archcompass.blocks.rwkv6.spec import RWKV6ChannelMix, RWKV6TimeMix
from archcompass.blocks.time_mixing import ShiftedMatrixState, hide, keeps, previous, recall, wide


class RWKV6TimeMixModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. `mix` and the up projections are for w, k, v, r, g in this order."""

    spec: RWKV6TimeMix

    def __init__(self, spec: RWKV6TimeMix, width: int) -> None:
        super().__init__(spec, width)
        mix, decay, heads = spec.time_mix_extra_dim, spec.time_decay_extra_dim, width // spec.head_dim
        self.mix_input = nn.Parameter(torch.empty(width))
        self.mix = nn.Parameter(torch.empty(5, width))
        self.mix_down = nn.Parameter(torch.empty(width, 5 * mix))
        self.mix_up = nn.Parameter(torch.empty(5, mix, width))
        self.decay = nn.Parameter(torch.empty(width))
        self.decay_down = nn.Parameter(torch.empty(width, decay))
        self.decay_up = nn.Parameter(torch.empty(decay, width))
        self.bonus = nn.Parameter(torch.empty(heads, spec.head_dim))
        self.key, self.value, self.receptance, self.gate = (Linear(width, width) for _ in range(4))
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.output = Linear(width, width)

    def reset_parameters(self) -> None:
        """Shares of the token before that fall over the channels, decays from slow to fast, no low-rank part yet."""
        ramp = torch.linspace(0, 1, self.width)
        with torch.no_grad():
            self.mix_input.copy_(1 - ramp)
            self.mix.copy_((1 - ramp).expand(5, -1))
            self.decay.copy_(-6 + 5 * ramp**0.8)
            self.bonus.copy_((1 - ramp).view_as(self.bonus))
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def read_together(self) -> tuple[tuple[Linear, ...]]:
        return ((self.key, self.value, self.receptance, self.gate),)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, ShiftedMatrixState) else None
        x = hide(x, context)
        mixed = self._shifted(x, previous(x, None if before is None else before.shift) - x)
        k, v, r, gate = at_once(*self.read_together(), mixed[1:])
        low_rank = (mixed[0] @ self.decay_down).tanh() @ self.decay_up
        log_decay = -(wide(self.decay) + wide(low_rank)).exp()
        by_head = (*x.shape[:2], *self.bonus.shape)
        r, k, v, log_decay = (part.view(by_head) for part in (r, k, v, log_decay))
        recurrent = None if before is None else before.recurrent
        y, recurrent = recall(r, k, v, log_decay, recurrent, bonus=self.bonus, exclusive=True)
        y = self._normalise(y.flatten(2)) * F.silu(gate)
        after = ShiftedMatrixState(x[:, -1].clone(), recurrent) if keeps(context) else None
        return self.output(y), after

    def _shifted(self, x: Tensor, difference: Tensor) -> Tensor:
        """[5, batch, time, width], mixtures of a token with the one before it, by shares that both choose."""
        low_rank = torch.addcmul(x, difference, self.mix_input) @ self.mix_down
        low_rank = low_rank.tanh().flatten(0, 1).unflatten(-1, (5, -1)).transpose(0, 1)
        shares = self.mix.unsqueeze(1) + low_rank @ self.mix_up  # [5, batch · time, width]
        mixed = torch.addcmul(x.flatten(0, 1), difference.flatten(0, 1), shares)
        return mixed.view(5, *x.shape)

    def _normalise(self, y: Tensor) -> Tensor:
        """Every head to mean zero and variance one."""
        heads = self.bonus.shape[0]
        flat = torch.group_norm(y.flatten(0, 1), heads, self.norm_weight, self.norm_bias, self.spec.norm_eps)
        return flat.view_as(y)


class RWKV6ChannelMixModule(ChannelMixModule):
    """RWKV-4's, but for μ, which is the share of the token before."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.mix.copy_((1 - torch.linspace(0, 1, self.width)).expand(2, -1))

    def mixed(self, x: Tensor, shifted: Tensor) -> Tensor:
        return super().mixed(shifted, x)


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an RWKV-6 spec."""
    if isinstance(spec, RWKV6TimeMix):
        return RWKV6TimeMixModule(spec, width)
    assert isinstance(spec, RWKV6ChannelMix)
    return RWKV6ChannelMixModule(spec, width)
