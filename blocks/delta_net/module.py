"""DeltaNet at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn

from archcompass.blocks.base import Block
from archcompass.blocks.delta_net.spec import DeltaNet
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear
from archcompass.blocks.time_mixing import ConvState, hide, keeps, rewrite, short_conv, start_conv, unit, wide
from archcompass.kernels.norm import rms_norm


class DeltaNetModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The columns of the input projection are q, k, v, gate, β."""

    spec: DeltaNet

    def __init__(self, spec: DeltaNet, width: int) -> None:
        super().__init__(spec, width)
        self.input = Linear(width, sum(spec.sections))
        self.conv_weight = nn.Parameter(torch.empty(spec.conv_channels, spec.conv_kernel))
        self.norm_weight = nn.Parameter(torch.empty(spec.value_head_dim))
        self.output = Linear(spec.value_width, width)
        self.conv_sections = [spec.key_width, spec.key_width, spec.value_width]

    def reset_parameters(self) -> None:
        start_conv(self.conv_weight)
        nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, ConvState) else None
        heads = (self.spec.num_attention_heads, -1)
        conved, gate, beta = self.input(hide(x, context)).split(self.spec.sections, dim=-1)
        conved, columns = short_conv(conved, self.conv_weight, None if before is None else before.conv)
        q, k, v = (part.unflatten(-1, heads) for part in conved.split(self.conv_sections, dim=-1))
        beta = wide(beta).sigmoid() * (2 if self.spec.allow_neg_eigval else 1)
        y, recurrent = rewrite(unit(q), unit(k), v, beta, None, None if before is None else before.recurrent)
        y = rms_norm(
            y,
            self.norm_weight,
            self.spec.norm_eps,
            gate=gate.unflatten(-1, heads) if self.spec.output_gate else None,
            gate_first=False,
        )
        return self.output(y.flatten(2)), ConvState(columns, recurrent) if keeps(context) else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a DeltaNet spec."""
    assert isinstance(spec, DeltaNet)
    return DeltaNetModule(spec, width)
