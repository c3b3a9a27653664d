"""Token embedding and output head: the two ends of a language model.

h = table[token] · multiplier          logits = softcap(h Wᵀ · multiplier)
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, Step, Traits, gemm
from archcompass.kernels.cross_entropy.memory import chunk_tokens


class Embedding(Block):
    """The input table. In training its whole gradient is written, whichever rows were looked up.

    Attributes:
        vocab_size: rows.
        multiplier: constant on the embeddings; "sqrt_width" is √hidden_size (Gemma).
        norm: a LayerNorm right after the table (RWKV's ln0).
    """

    label = "token embedding"
    kind: Literal["embedding"] = "embedding"
    vocab_size: PositiveInt
    multiplier: float | Literal["sqrt_width"] = 1.0
    norm: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(role="embedding")

    def parameters(self, width: int) -> Parameters:
        return Parameters(table=self.vocab_size * width, vector=2 * width if self.norm else 0)

    def work(self, width: int, step: Step) -> list[Op]:
        moved = float(step.tokens * width * step.element_bytes)
        look_up = Op("gather", "embedding", 0.0, activation_bytes=2 * moved, shape=(step.tokens, width))
        if not step.training:
            return [look_up]
        table = float(self.vocab_size * width * step.element_bytes)
        return [look_up, Op("pointwise", "table gradient", 0.0, activation_bytes=table, shape=(self.vocab_size, width))]

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(vocab_size=50), cls(vocab_size=50, multiplier="sqrt_width", norm=True)]


class Head(Block):
    """The output projection. Tied to the embedding it has no weights of its own, yet its product is paid.

    Attributes:
        vocab_size: columns.
        tied: shares the embedding's table.
        multiplier: constant on the logits.
        soft_cap: cap · tanh(logit / cap) (Gemma 2).
    """

    label = "output head"
    kind: Literal["head"] = "head"
    vocab_size: PositiveInt
    tied: bool = False
    multiplier: float = 1.0
    soft_cap: PositiveFloat | None = None

    @property
    def traits(self) -> Traits:
        return Traits(role="head")

    def parameters(self, width: int) -> Parameters:
        return Parameters(head=0 if self.tied else self.vocab_size * width)

    def rows(self, step: Step) -> int:
        """Positions whose logits are computed."""
        kept = (
            step.new_tokens if step.training or step.logits_to_keep == 0 else min(step.logits_to_keep, step.new_tokens)
        )
        return step.batch * kept

    def work(self, width: int, step: Step) -> list[Op]:
        return [gemm(step, "head", self.rows(step), width, self.vocab_size, quantised=False)]

    def live(self, width: int, step: Step) -> Live:
        """Logits; in training those of one chunk, then the gradients of stream and weight, which come with the loss."""
        if not step.training:
            return Live(peak_bytes=float(self.rows(step) * self.vocab_size * step.element_bytes))
        chunk = min(step.tokens, chunk_tokens(self.vocab_size)) if not step.fused else 0
        stream, weight = step.tokens * width * step.element_bytes, self.vocab_size * width
        forward = stream + 4 * weight + 12 * chunk * self.vocab_size
        return Live(peak_bytes=float(max(forward, 3 * (stream + weight * step.element_bytes))))

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(vocab_size=50), cls(vocab_size=50, multiplier=0.5, soft_cap=3.0)]
