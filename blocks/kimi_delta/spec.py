"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): Gated DeltaNet whose decay is a vector.

q, k, v = silu(conv(x W));   q, k of length one;   β = sigmoid(x W_b);   g = -exp(A) softplus(x F_a F_b + b_dt)
S_t = (I - β_t k_t k_tᵀ) Diag(exp(g_t)) S_{t-1} + β_t k_t v_tᵀ;   o_t = D^-½ S_tᵀ q_t
y = (norm(o) · sigmoid(x G_a G_b)) W_o
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.recurrence import (
    channels_alive,
    conv_state,
    convolution,
    delta_held,
    delta_recurrence,
    matrix_state,
    norm_held,
    recurrent_live,
)


class KimiDelta(Block):
    """The delta rule with a decay per key channel.

    Attributes:
        num_attention_heads: heads (H, HF linear_num_heads).
        head_dim: channels of a query, key, decay and value of one head, and the rank of the projections of decay and
            output gate (D, HF linear_head_dim).
        conv_kernel: taps of the short convolution over queries, keys and values (HF linear_conv_kernel_dim).
        norm_eps: of the gated RMSNorm over each head.
    """

    label = "Kimi Delta Attention"
    kind: Literal["kimi_delta"] = "kimi_delta"
    num_attention_heads: PositiveInt
    head_dim: PositiveInt = 128
    conv_kernel: PositiveInt = 4
    norm_eps: PositiveFloat = 1e-5

    @property
    def inner_width(self) -> int:
        """Channels of all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def sections(self) -> list[int]:
        """Columns of the input projection: queries, keys and values, low-rank decay, low-rank gate, β."""
        return [3 * self.inner_width, self.head_dim, self.head_dim, self.num_attention_heads]

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        inner = self.inner_width
        matrix = width * (sum(self.sections) + inner) + 2 * self.head_dim * inner
        # The convolution, b_dt, A, and the norm's weight.
        vector = 3 * inner * self.conv_kernel + inner + self.num_attention_heads + self.head_dim
        return Parameters(matrix=matrix, vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [
            conv_state(3 * self.inner_width, self.conv_kernel),
            matrix_state(self.num_attention_heads, self.head_dim, self.head_dim),
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, inner = step.tokens, self.inner_width
        return [
            gemm(step, "input projection", rows, width, sum(self.sections)),
            gemm(step, "decay and gate projection", rows, self.head_dim, inner, count=2),
            convolution(step, 3 * inner, self.conv_kernel),
            pointwise(step, "unit length of q and k, decay", 3 * rows * inner),
            delta_recurrence(
                step,
                "gated delta rule",
                key_heads=self.num_attention_heads,
                heads=self.num_attention_heads,
                key_dim=self.head_dim,
                value_dim=self.head_dim,
                decay="vector",
            ),
            pointwise(step, "gated norm", rows * inner, reads=2),
            gemm(step, "output projection", rows, inner, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        heads, inner, projected = self.num_attention_heads, self.inner_width, sum(self.sections)
        core = delta_held(
            step, key_heads=heads, heads=heads, key_dim=self.head_dim, value_dim=self.head_dim, decay="vector"
        )
        before = channels_alive(step, projected + 5 * inner, inner)
        saved = channels_alive(step, projected, 5 * inner)
        return recurrent_live(step, before, core, norm_held(step, inner, "sigmoid"), inner, saved, 3 * inner)

    def share(self, cards: int) -> Self:
        return self.model_copy(update={"num_attention_heads": -(-self.num_attention_heads // cards)})

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(num_attention_heads=3, head_dim=6),
            cls(num_attention_heads=1, head_dim=10, conv_kernel=2, norm_eps=1e-6),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=8, head_dim=128), 1024

    @classmethod
    def other_sizes(cls) -> list[Self]:
        return [cls(num_attention_heads=8, head_dim=64)]
