"""Linear attention (Katharopoulos et al., arXiv 2006.16236) and its Taylor form (Based, Arora et al., arXiv 2402.18668).

    S_t = S_{t-1} + φ(k_t) v_tᵀ      z_t = z_{t-1} + φ(k_t)      o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t))

φ(x) = elu(x) + 1 in the first paper; in Based it is the second order of the Taylor series of the softmax's exponential,
φ(x) = [1, x / d^¼, (x ⊗ x) / √(2d)], on few channels d.
"""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.recurrence import channels_alive, linear_held, linear_recurrence, matrix_state
from archcompass.errors import SpecError


class LinearAttention(Block):
    """Attention without a softmax, as one sum over the past.

    Attributes:
        num_attention_heads: heads (H).
        feature_dim: channels of a query and a key of one head before the feature map (d).
        head_dim: channels of a value of one head (V).
        feature_map: "elu" is elu(x) + 1; "taylor" is Based's; "relu" and "identity" say what they are.
        normalise: divide by the sum of the weights, as a softmax does.
    """

    label = "linear attention"
    kind: Literal["linear_attention"] = "linear_attention"
    num_attention_heads: PositiveInt
    feature_dim: PositiveInt
    head_dim: PositiveInt
    feature_map: Literal["elu", "relu", "taylor", "identity"] = "elu"
    normalise: bool = True

    @model_validator(mode="after")
    def _weights_are_positive(self) -> Self:
        if self.normalise and self.feature_map == "identity":
            raise SpecError("normalise divides by a sum that feature_map 'identity' can make zero; set it to false")
        return self

    @property
    def features(self) -> int:
        """Channels of a query or key of one head after the feature map (K)."""
        return 1 + self.feature_dim + self.feature_dim**2 if self.feature_map == "taylor" else self.feature_dim

    @property
    def columns(self) -> int:
        """Columns of a head's state: the values, and the sum of the weights where it is needed."""
        return self.head_dim + self.normalise

    @property
    def sections(self) -> list[int]:
        """Columns of the input projection: queries, keys, values."""
        key = self.num_attention_heads * self.feature_dim
        return [key, key, self.num_attention_heads * self.head_dim]

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        return Parameters(matrix=width * (sum(self.sections) + self.sections[2]))

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [matrix_state(self.num_attention_heads, self.features, self.columns)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, heads = step.tokens, self.num_attention_heads
        return [
            gemm(step, "qkv projection", rows, width, sum(self.sections)),
            pointwise(step, "feature map", 2 * rows * heads * self.features),
            linear_recurrence(
                step, "linear attention", heads=heads, key_dim=self.features, value_dim=self.columns, decay="none"
            ),
            *([pointwise(step, "division by the weights", rows * self.sections[2])] if self.normalise else []),
            gemm(step, "output projection", rows, self.sections[2], width),
        ]

    def live(self, width: int, step: Step) -> Live:
        heads, projected, values = self.num_attention_heads, sum(self.sections), self.num_attention_heads * self.columns
        core = linear_held(step, heads=heads, key_dim=self.features, value_dim=self.columns, decay="none")
        features = 2 * heads * self.features
        before = channels_alive(step, projected + features + values * self.normalise)
        masks = step.tokens * features if self.feature_map == "elu" else 0
        saved = channels_alive(step, projected + features + values * self.normalise + self.sections[2]) + masks
        flowing = max(core.backward_bytes, channels_alive(step, 2 * (1 + self.normalise) * values))
        return Live(
            peak_bytes=before + core.peak_bytes,
            saved_bytes=(saved + core.saved_bytes) * step.training,
            backward_bytes=flowing * step.training,
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(num_attention_heads=3, feature_dim=6, head_dim=10),
            cls(num_attention_heads=2, feature_dim=3, head_dim=8, feature_map="taylor"),
            cls(num_attention_heads=1, feature_dim=5, head_dim=12, feature_map="identity", normalise=False),
            cls(num_attention_heads=2, feature_dim=4, head_dim=4, feature_map="relu"),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=16, feature_dim=64, head_dim=64), 1024
