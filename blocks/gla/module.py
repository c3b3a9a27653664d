"""Gated linear attention at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.gla.spec import GLA
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear
from archcompass.blocks.time_mixing import MatrixState, hide, keeps, recall, wide
from archcompass.kernels.norm import rms_norm


class GLAModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]."""

    spec: GLA

    def __init__(self, spec: GLA, width: int) -> None:
        super().__init__(spec, width)
        self.input = Linear(width, sum(spec.sections))
        self.decay = Linear(spec.gate_low_rank_dim, spec.key_width, bias=True)
        self.norm_weight = nn.Parameter(torch.empty(spec.value_head_dim))
        self.output = Linear(spec.value_width, width)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state.recurrent if isinstance(state, MatrixState) else None
        heads = (self.spec.num_attention_heads, -1)
        *parts, low_rank = self.input(hide(x, context)).split(self.spec.sections, dim=-1)
        q, k, v, gate = (part.unflatten(-1, heads) for part in parts)
        decay = F.logsigmoid(wide(self.decay(low_rank))) / self.spec.gate_logit_normalizer
        y, recurrent = recall(q, k, v, decay.unflatten(-1, heads), before, scale=self.spec.key_head_dim**-0.5)
        y = rms_norm(y, self.norm_weight, self.spec.norm_eps, gate=gate, gate_first=False)
        return self.output(y.flatten(2)), MatrixState(recurrent) if keeps(context) else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a gated linear attention spec."""
    assert isinstance(spec, GLA)
    return GLAModule(spec, width)
