"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450) over the width.

RMSNorm:    y = x / sqrt(mean(x²) + eps) · weight
LayerNorm:  y = (x − mean(x)) / sqrt(var(x) + eps) · weight + bias
"""

from typing import Literal, Self

from pydantic import PositiveFloat

from archcompass.blocks.base import Block, Live, Op, Parameters, Step, Traits, pointwise
from archcompass.kernels.norm.memory import rms_norm_held


class Norm(Block):
    """What every norm has: an epsilon, and work that is paid in bytes alone."""

    eps: PositiveFloat = 1e-6

    @property
    def traits(self) -> Traits:
        return Traits(role="norm")

    def work(self, width: int, step: Step) -> list[Op]:
        return [pointwise(step, "norm", step.tokens * width)]

    def live(self, width: int, step: Step) -> Live:
        stream = step.tokens * width * step.element_bytes
        return Live(peak_bytes=stream, saved_bytes=stream * step.training, backward_bytes=stream * step.training)

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls.model_validate({})]


class RMSNorm(Norm):
    """Root-mean-square norm.

    Attributes:
        unit_offset: the stored weight is the distance from one, y · (1 + weight) (Gemma, Qwen3-Next).
        weight: whether there is one at all.
    """

    label = "RMSNorm"
    kind: Literal["rms_norm"] = "rms_norm"
    unit_offset: bool = False
    weight: bool = True

    def parameters(self, width: int) -> Parameters:
        return Parameters(vector=width if self.weight else 0)

    def live(self, width: int, step: Step) -> Live:
        held = rms_norm_held(rows=step.tokens, width=width, element_bytes=step.element_bytes, fused=step.fused)
        kept, flowing = held.saved_bytes * step.training, held.backward_bytes * step.training
        return Live(peak_bytes=held.peak_bytes, saved_bytes=kept, backward_bytes=flowing)

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(), cls(unit_offset=True), cls(weight=False)]


class LayerNorm(Norm):
    """Layer norm with weight and bias."""

    label = "LayerNorm"
    kind: Literal["layer_norm"] = "layer_norm"
    eps: PositiveFloat = 1e-5
    bias: bool = True

    def parameters(self, width: int) -> Parameters:
        return Parameters(vector=2 * width if self.bias else width)
