"""Kimi Delta Attention at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.kimi_delta.spec import KimiDelta
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


class KimiDeltaModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width].

    The columns of the input projection are q, k, v, the low-rank decay F_a, the low-rank gate G_a, β.
    """

    spec: KimiDelta

    def __init__(self, spec: KimiDelta, width: int) -> None:
        super().__init__(spec, width)
        self.input = Linear(width, sum(spec.sections))
        self.conv_weight = nn.Parameter(torch.empty(3 * spec.inner_width, spec.conv_kernel))
        self.decay = Linear(spec.head_dim, spec.inner_width)
        self.a_log = nn.Parameter(torch.empty(spec.num_attention_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.inner_width))
        self.gate = Linear(spec.head_dim, spec.inner_width)
        self.norm_weight = nn.Parameter(torch.empty(spec.head_dim))
        self.output = Linear(spec.inner_width, width)

    def reset_parameters(self) -> None:
        start_conv(self.conv_weight)
        start_decay(self.a_log, self.dt_bias)
        nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, ConvState) else None
        count, dim = heads = self.spec.num_attention_heads, self.spec.head_dim
        conved, decay, gate, beta = self.input(hide(x, context)).split(self.spec.sections, dim=-1)
        conved, columns = short_conv(conved, self.conv_weight, None if before is None else before.conv)
        keyed, v = conved.unflatten(-1, (3 * count, dim)).split([2 * count, count], dim=-2)
        q, k = unit(keyed).chunk(2, dim=-2)
        log_decay = F.softplus(wide(self.decay(decay)) + wide(self.dt_bias)).unflatten(-1, heads)
        log_decay = -wide(self.a_log).exp()[:, None] * log_decay
        recurrent = None if before is None else before.recurrent
        y, recurrent = rewrite(q, k, v, wide(beta).sigmoid(), log_decay, recurrent)
        gate = self.gate(gate).unflatten(-1, heads)
        y = rms_norm(y, self.norm_weight, self.spec.norm_eps, gate=gate, gate_first=False, gate_activation="sigmoid")
        return self.output(y.flatten(2)), ConvState(columns, recurrent) if keeps(context) else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a Kimi Delta Attention spec."""
    assert isinstance(spec, KimiDelta)
    return KimiDeltaModule(spec, width)
