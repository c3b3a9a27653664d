"""Gated DeltaNet at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.gated_delta_net.spec import GatedDeltaNet
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear
from archcompass.blocks.time_mixing import (
    ConvState,
    hide,
    keeps,
    rewrite,
    short_conv,
    start_conv,
    start_decay,
    unit,
    wide,
)
from archcompass.kernels.norm import rms_norm


class GatedDeltaNetModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The columns of the input projection are q, k, v, z, b, a."""

    spec: GatedDeltaNet

    def __init__(self, spec: GatedDeltaNet, width: int) -> None:
        super().__init__(spec, width)
        self.input = Linear(width, sum(spec.sections))
        self.conv_weight = nn.Parameter(torch.empty(spec.conv_channels, spec.conv_kernel))
        self.a_log = nn.Parameter(torch.empty(spec.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.num_value_heads))
        self.norm_weight = nn.Parameter(torch.empty(spec.value_head_dim))
        self.output = Linear(spec.value_width, width)

    def reset_parameters(self) -> None:
        start_conv(self.conv_weight)
        start_decay(self.a_log, self.dt_bias)
        nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, ConvState) else None
        conved, z, b, a = self.input(hide(x, context)).split(self.spec.sections, dim=-1)
        q, k, v, columns = self._filter(conved, before)
        beta = wide(b).sigmoid() * (2 if self.spec.allow_neg_eigval else 1)
        log_decay = -wide(self.a_log).exp() * F.softplus(wide(a) + wide(self.dt_bias))
        y, recurrent = rewrite(q, k, v, beta, log_decay, None if before is None else before.recurrent)
        z = z.unflatten(-1, (self.spec.num_value_heads, -1))
        y = rms_norm(y, self.norm_weight, self.spec.norm_eps, gate=z, gate_first=False)
        return self.output(y.flatten(2)), ConvState(columns, recurrent) if keeps(context) else None

    def _filter(self, conved: Tensor, before: ConvState | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys of length one and values, by head after the convolution, and the columns it leaves."""
        conved, columns = short_conv(conved, self.conv_weight, None if before is None else before.conv)
        keyed, v = conved.split([2 * self.spec.key_width, self.spec.value_width], dim=-1)
        q, k = unit(keyed.unflatten(-1, (2 * self.spec.num_key_heads, -1))).chunk(2, dim=-2)
        return q, k, v.unflatten(-1, (self.spec.num_value_heads, -1)), columns


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a Gated DeltaNet spec."""
    assert isinstance(spec, GatedDeltaNet)
    return GatedDeltaNetModule(spec, width)
