"""Gated linear attention (Yang et al., arXiv 2312.06635).

α_t = sigmoid(x_t W_down W_up + b)^(1/τ);   S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ;   o_t = K^-½ S_tᵀ q_t
y = (norm(o) · silu(x W_g)) W_o
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.recurrence import (
    channels_alive,
    linear_held,
    linear_recurrence,
    matrix_state,
    norm_held,
    recurrent_live,
)


class GLA(Block):
    """Linear attention with a decay per key channel.

    Attributes:
        num_attention_heads: heads (H).
        key_head_dim: channels of a query, key and decay of one head (K).
        value_head_dim: channels of a value of one head (V).
        gate_low_rank_dim: rank of the decay's projection.
        gate_logit_normalizer: τ; the larger, the slower the state forgets.
        norm_eps: of the RMSNorm over each head.
    """

    label = "gated linear attention"
    kind: Literal["gla"] = "gla"
    num_attention_heads: PositiveInt
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    gate_low_rank_dim: PositiveInt = 16
    gate_logit_normalizer: PositiveFloat = 16.0
    norm_eps: PositiveFloat = 1e-5

    @property
    def key_width(self) -> int:
        """Channels of all queries, keys or decays."""
        return self.num_attention_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of all values."""
        return self.num_attention_heads * self.value_head_dim

    @property
    def sections(self) -> list[int]:
        """Columns of the input projection: queries, keys, values, output gate, low-rank decay."""
        return [self.key_width, self.key_width, self.value_width, self.value_width, self.gate_low_rank_dim]

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        matrix = width * (sum(self.sections) + self.value_width) + self.gate_low_rank_dim * self.key_width
        return Parameters(matrix=matrix, vector=self.key_width + self.value_head_dim)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [matrix_state(self.num_attention_heads, self.key_head_dim, self.value_head_dim)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            gemm(step, "input projection", rows, width, sum(self.sections)),
            gemm(step, "decay projection", rows, self.gate_low_rank_dim, self.key_width),
            pointwise(step, "decay", rows * self.key_width),
            linear_recurrence(
                step,
                "gated linear attention",
                heads=self.num_attention_heads,
                key_dim=self.key_head_dim,
                value_dim=self.value_head_dim,
                decay="vector",
            ),
            pointwise(step, "gated norm", rows * self.value_width, reads=2),
            gemm(step, "output projection", rows, self.value_width, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        core = linear_held(
            step,
            heads=self.num_attention_heads,
            key_dim=self.key_head_dim,
            value_dim=self.value_head_dim,
            decay="vector",
        )
        projected = sum(self.sections)
        saved = channels_alive(step, projected, 2 * self.key_width)
        before = channels_alive(step, projected, self.key_width)
        return recurrent_live(step, before, core, norm_held(step, self.value_width), self.value_width, saved)

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(num_attention_heads=3, key_head_dim=6, value_head_dim=10, gate_low_rank_dim=5),
            cls(num_attention_heads=1, key_head_dim=12, value_head_dim=8, gate_logit_normalizer=1.0),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=4, key_head_dim=128, value_head_dim=256), 1024
