"""The norms as modules."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.norm.spec import LayerNorm, RMSNorm
from archcompass.blocks.runtime import BlockModule, BlockState, Context
from archcompass.kernels.norm import rms_norm


class RMSNormModule(BlockModule):
    """x [..., width] -> [..., width]; the mean square is taken in float32."""

    def __init__(self, spec: RMSNorm, width: int) -> None:
        super().__init__(spec, width)
        self.eps, self.unit_offset = spec.eps, spec.unit_offset
        self.weight = nn.Parameter(torch.empty(width)) if spec.weight else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def normalise(self, x: Tensor) -> Tensor:
        """The norm alone, without the state that every block returns."""
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        return self.normalise(x), state


class LayerNormModule(BlockModule):
    """x [..., width] -> [..., width]."""

    def __init__(self, spec: LayerNorm, width: int) -> None:
        super().__init__(spec, width)
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def normalise(self, x: Tensor) -> Tensor:
        """The norm alone, without the state that every block returns."""
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        return self.normalise(x), state


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a norm's spec."""
    return RMSNormModule(spec, width) if isinstance(spec, RMSNorm) else LayerNormModule(spec, width)  # type: ignore[arg-type]
