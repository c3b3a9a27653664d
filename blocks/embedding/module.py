"""The two ends of a language model at work."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.embedding.spec import Embedding, Head
from archcompass.blocks.runtime import BlockModule, BlockState, Context
from archcompass.kernels.linear import linear


class EmbeddingModule(BlockModule):
    """ids [batch, time] -> [batch, time, width]."""

    spec: Embedding

    def __init__(self, spec: Embedding, width: int) -> None:
        super().__init__(spec, width)
        self.weight = nn.Parameter(torch.empty(spec.vocab_size, width))
        self.norm = nn.LayerNorm(width, eps=1e-5) if spec.norm else None
        self.multiplier = width**0.5 if spec.multiplier == "sqrt_width" else spec.multiplier

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        embedded = F.embedding(x, self.weight)
        if self.multiplier != 1.0:
            # HF rounds the constant to the weights' dtype before it multiplies (Gemma).
            embedded = embedded * torch.tensor(self.multiplier, dtype=embedded.dtype, device=embedded.device)
        return embedded if self.norm is None else self.norm(embedded), state


class HeadModule(BlockModule):
    """x [batch, time, width] -> logits [batch, time, vocab]. A tied head is given the table at each call."""

    spec: Head

    def __init__(self, spec: Head, width: int) -> None:
        super().__init__(spec, width)
        self.weight = None if spec.tied else nn.Parameter(torch.empty(spec.vocab_size, width))

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)

    def logits(self, x: Tensor, table: Tensor) -> Tensor:
        """Logits of x; `table` is used when the head has no weights of its own."""
        logits = linear(x, table if self.weight is None else self.weight)
        logits = logits if self.spec.multiplier == 1.0 else logits * self.spec.multiplier
        cap = self.spec.soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        assert self.weight is not None, "a tied head is called through `logits`"
        return self.logits(x, self.weight), state


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an embedding's or a head's spec."""
    if isinstance(spec, Embedding):
        return EmbeddingModule(spec, width)
    assert isinstance(spec, Head)
    return HeadModule(spec, width)
