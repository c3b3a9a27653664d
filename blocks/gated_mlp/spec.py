"""Multilayer perceptrons: gated (Shazeer, arXiv 2002.05202) and plain.

gated:  y = (act(x W_gate) ⊙ x W_up) W_down          plain:  y = act(x W_up) W_down
"""

from typing import Literal, Self

from pydantic import PositiveInt

from archcompass.blocks.activations import Activation
from archcompass.blocks.base import Block, Live, Op, Parameters, Step, Traits, gemm, pointwise


class GatedMLP(Block):
    """A dense channel mixer.

    Attributes:
        intermediate_size: hidden channels (I).
        hidden_act: the nonlinearity.
        gated: multiply by a second projection (SwiGLU and its kin); plain otherwise.
        bias: biases on all projections.
        gate_multiplier, down_multiplier: constants on the gate before its nonlinearity and on the output (Falcon-H1).
    """

    label = "gated MLP"
    kind: Literal["gated_mlp"] = "gated_mlp"
    intermediate_size: PositiveInt
    hidden_act: Activation = "silu"
    gated: bool = True
    bias: bool = False
    gate_multiplier: float = 1.0
    down_multiplier: float = 1.0

    @property
    def inward(self) -> int:
        """Columns of the first projection."""
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def traits(self) -> Traits:
        return Traits(role="channel")

    def parameters(self, width: int) -> Parameters:
        biases = self.inward + width if self.bias else 0
        return Parameters(matrix=width * (self.inward + self.intermediate_size), vector=biases)

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            gemm(step, "gate and up projection" if self.gated else "up projection", rows, width, self.inward),
            pointwise(step, "activation", rows * self.intermediate_size, reads=2 if self.gated else 1),
            gemm(step, "down projection", rows, self.intermediate_size, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        inner, each = self.intermediate_size, step.tokens * step.element_bytes
        finished = 2 * inner if self.gated else max(inner, width)  # the activation beside the product, or y
        return Live(
            peak_bytes=each * (self.inward + max(finished, inner + width * self.gated)),
            saved_bytes=each * (self.inward + finished * self.gated + inner * (not self.gated)) * step.training,
            backward_bytes=each
            * inner
            * (2 if self.gated else 3)
            * step.training,  # of the product and of the activation
        )

    def share(self, cards: int) -> Self:
        return self.model_copy(update={"intermediate_size": -(-self.intermediate_size // cards)})

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(intermediate_size=48), cls(intermediate_size=32, hidden_act="relu2", gated=False, bias=True)]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(intermediate_size=2816), 1024
