"""Multilayer perceptrons at work."""

from torch import Tensor

from archcompass.blocks.activations import function
from archcompass.blocks.base import Block
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear


class GatedMLPModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]; no state. Gate and up projection are one matrix, gate first."""

    spec: GatedMLP

    def __init__(self, spec: GatedMLP, width: int) -> None:
        super().__init__(spec, width)
        self.inward = Linear(width, spec.inward, bias=spec.bias)
        self.down = Linear(spec.intermediate_size, width, bias=spec.bias)
        self.activation = function(spec.hidden_act)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        return self.finish(self.inward(x)), state

    def finish(self, hidden: Tensor) -> Tensor:
        """All that comes after the first projection: [batch, time, inward] -> [batch, time, width]."""
        if self.spec.gated:
            gate, up = hidden.chunk(2, dim=-1)
            gate = gate if self.spec.gate_multiplier == 1.0 else gate * self.spec.gate_multiplier
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(hidden)
        y: Tensor = self.down(hidden)
        return y if self.spec.down_multiplier == 1.0 else y * self.spec.down_multiplier


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an MLP spec."""
    assert isinstance(spec, GatedMLP)
    return GatedMLPModule(spec, width)
