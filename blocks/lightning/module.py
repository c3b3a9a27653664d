"""Lightning attention at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn

from archcompass.blocks.activations import function
from archcompass.blocks.base import Block
from archcompass.blocks.lightning.spec import Lightning
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear
from archcompass.blocks.time_mixing import MatrixState, constant, hide, keeps, recall
from archcompass.kernels.norm import rms_norm


class LightningModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The rows of the qkv projection are q, k, v of one head after another."""

    spec: Lightning

    def __init__(self, spec: Lightning, width: int, layer: int) -> None:
        super().__init__(spec, width)
        self.qkv = Linear(width, 3 * spec.inner_width)
        self.gate = Linear(width, spec.inner_width)
        self.norm_weight = nn.Parameter(torch.empty(spec.inner_width))
        self.output = Linear(spec.inner_width, width)
        self.activation = function(spec.hidden_act)
        self.log_decay = tuple(-slope for slope in spec.slopes(layer))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state.recurrent if isinstance(state, MatrixState) else None
        heads = (self.spec.num_attention_heads, 3, self.spec.head_dim)
        q, k, v = hide(self.activation(self.qkv(x)), context).unflatten(-1, heads).unbind(-2)
        log_decay = constant(self.log_decay, x.device, torch.promote_types(x.dtype, torch.float32))
        y, recurrent = recall(q, k, v, log_decay, before)
        y = rms_norm(
            y.flatten(2),
            self.norm_weight,
            self.spec.norm_eps,
            gate=self.gate(x),
            gate_first=False,
            gate_activation="sigmoid",
        )
        return self.output(y), MatrixState(recurrent) if keeps(context) else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a lightning attention spec at depth `layer`, which sets its decay."""
    assert isinstance(spec, Lightning)
    return LightningModule(spec, width, layer)
