"""Multi-scale retention (RetNet, Sun et al., arXiv 2307.08621).

    S_t = γ_h S_{t-1} + k_t v_tᵀ;   o_t = K^-½ S_tᵀ q_t;   y = (norm(o) · silu(x W_g)) W_o;   γ_h = 1 - 2^(-5-h)

Queries and keys turn with their position, pair i of a head by 10000^(-i / (K/2 - 1)) per token, as in the authors' code
(torchscale), whose parallel form divides by running sums that the norm after it takes out again.
"""

import math
from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.recurrence import (
    channels_alive,
    linear_held,
    linear_recurrence,
    matrix_state,
    norm_held,
    recurrent_live,
)
from archcompass.errors import SpecError


class Retention(Block):
    """Linear attention with a constant decay per head.

    Attributes:
        num_attention_heads: heads (H).
        key_head_dim: channels of a query and key of one head (K), even, at least four.
        value_head_dim: channels of a value of one head (V).
        norm_eps: of the RMSNorm over each head, which has no weight.
    """

    label = "retention"
    kind: Literal["retention"] = "retention"
    num_attention_heads: PositiveInt
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _channels_turn_in_pairs(self) -> Self:
        if self.key_head_dim % 2 or self.key_head_dim < 4:
            nearest = max(4, self.key_head_dim + self.key_head_dim % 2)
            raise SpecError(f"key_head_dim ({self.key_head_dim}) must be even and at least 4; nearest: {nearest}")
        return self

    @property
    def key_width(self) -> int:
        """Channels of all queries, or keys."""
        return self.num_attention_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of all values."""
        return self.num_attention_heads * self.value_head_dim

    @property
    def log_decay(self) -> tuple[float, ...]:
        """log γ of every head."""
        return tuple(math.log1p(-(2.0 ** (-5 - head))) for head in range(self.num_attention_heads))

    @property
    def frequencies(self) -> tuple[float, ...]:
        """[key_head_dim / 2] radians per position."""
        pairs = self.key_head_dim // 2
        return tuple(10000 ** (-pair / (pairs - 1)) for pair in range(pairs))

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        return Parameters(matrix=width * (2 * self.key_width + 3 * self.value_width))

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [matrix_state(self.num_attention_heads, self.key_head_dim, self.value_head_dim)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            gemm(step, "qkv and gate projection", rows, width, 2 * self.key_width + 2 * self.value_width),
            pointwise(step, "rotary", 2 * rows * self.key_width),
            linear_recurrence(
                step,
                "retention",
                heads=self.num_attention_heads,
                key_dim=self.key_head_dim,
                value_dim=self.value_head_dim,
                decay="constant",
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
            decay="constant",
        )
        norm = norm_held(step, self.value_width, weight=False)
        projected = channels_alive(step, 2 * self.key_width + 2 * self.value_width)
        # Turned queries and keys and the gate's cast take the projection's place, where casts are copies.
        saved = 0.0 if step.element_bytes < 4 and not step.fused else projected
        before = projected + channels_alive(step, 2 * self.key_width)
        return recurrent_live(step, before, core, norm, self.value_width, saved)

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(num_attention_heads=3, key_head_dim=6, value_head_dim=10),
            cls(num_attention_heads=1, key_head_dim=16, value_head_dim=8),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=4, key_head_dim=256, value_head_dim=512), 1024
