"""The RG-LRU block at work. One forward serves prompts, further segments and single steps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.activations import function
from archcompass.blocks.base import Block
from archcompass.blocks.rg_lru.spec import RGLRU
from archcompass.blocks.runtime import BlockModule, BlockState, Context, FixedState, Linear
from archcompass.blocks.time_mixing import hide, keeps, start_conv, wide
from archcompass.kernels.conv import causal_conv
from archcompass.kernels.diagonal_scan import diagonal_scan

DECAY_SCALE = 8.0  # c of the paper
SMALLEST_SQUARE = 1e-12  # keeps the slope of the root finite where the decay is one


@dataclass(slots=True)
class RGLRUState(FixedState):
    """conv [batch, taps - 1, lru_width], oldest first, and recurrent [batch, lru_width], float32."""

    conv: Tensor
    recurrent: Tensor


class RGLRUModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width].

    The columns of the input projection are the recurrence's input, then the output gate; those of a block of `gates` are
    the input gate, then the recurrence gate.
    """

    spec: RGLRU

    def __init__(self, spec: RGLRU, width: int) -> None:
        super().__init__(spec, width)
        channels, blocks, block = spec.lru_width, spec.num_attention_heads, spec.block_width
        self.input = Linear(width, 2 * channels, bias=True)
        self.conv_weight = nn.Parameter(torch.empty(channels, spec.conv1d_width))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.gates = nn.Parameter(torch.empty(blocks, block, 2 * block))
        self.gates_bias = nn.Parameter(torch.empty(blocks, 2 * block))
        self.decay = nn.Parameter(torch.empty(channels))
        self.output = Linear(channels, width, bias=True)
        self.activation = function(spec.hidden_activation)

    def reset_parameters(self) -> None:
        """a^8 uniform between 0.9 and 0.999 (the paper, section 2.4)."""
        start_conv(self.conv_weight)
        nn.init.normal_(self.gates, std=self.spec.block_width**-0.5)
        for zeros in (self.conv_bias, self.gates_bias):
            nn.init.zeros_(zeros)
        with torch.no_grad():
            self.decay.uniform_(0.9, 0.999).log_().div_(-DECAY_SCALE).expm1_().log_()

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, RGLRUState) else None
        context = context or Context(past=0 if before is None else 1)
        branch, gate = self.input(x).chunk(2, dim=-1)
        branch, columns = causal_conv(
            hide(branch, context),
            self.conv_weight,
            self.conv_bias,
            initial_state=None if before is None else before.conv,
        )
        log_decay, entering = self._gated(branch, context)
        h, recurrent = diagonal_scan(
            log_decay, hide(entering, context), initial_state=None if before is None else before.recurrent
        )
        y = self.output(h.to(x.dtype) * self.activation(gate))
        return y, RGLRUState(columns, recurrent) if keeps(context) else None

    def _gated(self, branch: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """log a and √(1 - a²) (i · u), [batch, time, channels]; the first token of a sequence has no root."""
        blocks = branch.flatten(0, 1).unflatten(-1, (self.spec.num_attention_heads, -1)).transpose(0, 1)
        gates = torch.baddbmm(self.gates_bias.unsqueeze(1), blocks, self.gates).transpose(0, 1).sigmoid()
        enter, recur = (gate.flatten(1).view_as(branch) for gate in gates.chunk(2, dim=-1))
        log_decay = -DECAY_SCALE * wide(recur) * F.softplus(wide(self.decay))
        root = (-torch.expm1(2 * log_decay)).clamp(min=SMALLEST_SQUARE).sqrt()
        first = (context.positions(branch.shape[1], branch.device) == 0).unsqueeze(-1)
        return log_decay, wide(enter * branch) * torch.where(first, 1.0, root)


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an RG-LRU spec."""
    assert isinstance(spec, RGLRU)
    return RGLRUModule(spec, width)
