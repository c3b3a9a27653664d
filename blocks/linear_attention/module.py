"""Linear attention at work. One forward serves prompts, further segments and single steps."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.linear_attention.spec import LinearAttention
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear
from archcompass.blocks.time_mixing import MatrixState, hide, keeps, recall

SMALLEST_WEIGHT = 1e-6  # a sum of weights below this divides as if it were this (Katharopoulos et al.)


class LinearAttentionModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The sum of the weights is one more column of the values."""

    spec: LinearAttention

    def __init__(self, spec: LinearAttention, width: int) -> None:
        super().__init__(spec, width)
        self.input = Linear(width, sum(spec.sections))
        self.output = Linear(spec.sections[2], width)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state.recurrent if isinstance(state, MatrixState) else None
        heads = (self.spec.num_attention_heads, -1)
        q, k, v = (part.unflatten(-1, heads) for part in self.input(x).split(self.spec.sections, dim=-1))
        feature_map = FEATURE_MAPS[self.spec.feature_map]
        q, k = feature_map(q), hide(feature_map(k), context)
        y, recurrent = self._mean(q, k, v, before) if self.spec.normalise else recall(q, k, v, None, before)
        return self.output(y.flatten(2)), MatrixState(recurrent) if keeps(context) else None

    def _mean(self, q: Tensor, k: Tensor, v: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of weighted values over that of the weights, which a long past takes out of float16's range."""
        dtype = v.dtype
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        if dtype == torch.float16:
            q, k, v = q.float(), k.float(), v.float()
        sums, recurrent = recall(q, k, v, None, before)
        return (sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST_WEIGHT)).to(dtype), recurrent


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 without the difference, in which half types would lose all of a small e^x."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def taylor(x: Tensor) -> Tensor:
    """[1, x / d^¼, (x ⊗ x) / √(2d)], so that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √d."""
    dim = x.shape[-1]
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x * dim**-0.25, square * (2 * dim) ** -0.5], dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "taylor": taylor,
    "identity": lambda x: x,
}


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a linear attention spec."""
    assert isinstance(spec, LinearAttention)
    return LinearAttentionModule(spec, width)
