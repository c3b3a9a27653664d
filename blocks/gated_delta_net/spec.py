"""Gated DeltaNet (Yang et al., arXiv 2412.06464), as Qwen3-Next and Olmo hybrid build it.

q, k, v = silu(conv(x W));   q, k of length one;   β = sigmoid(x W_b);   g = -exp(A) softplus(x W_a + b_dt)
S_t = exp(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ;   o_t = K^-½ S_tᵀ q_t;   y = (norm(o) · silu(x W_z)) W_o
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import (
    Block,
    Live,
    Op,
    Parameters,
    StateTensor,
    Step,
    Traits,
    gemm,
    must_divide,
    pointwise,
    shared_heads,
)
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


class GatedDeltaNet(Block):
    """The delta rule with a scalar decay.

    Attributes:
        num_key_heads: heads of queries and keys (HF linear_num_key_heads); divides the value heads, which share them in
            consecutive groups.
        num_value_heads: heads of values, decays and the state (HF linear_num_value_heads).
        key_head_dim: channels of a query and key of one head (K, HF linear_key_head_dim).
        value_head_dim: channels of a value of one head (V, HF linear_value_head_dim).
        conv_kernel: taps of the short convolution over queries, keys and values (HF linear_conv_kernel_dim).
        allow_neg_eigval: β from 0 to 2 (Olmo hybrid).
        norm_eps: of the gated RMSNorm over each head.
    """

    label = "Gated DeltaNet"
    kind: Literal["gated_delta_net"] = "gated_delta_net"
    num_key_heads: PositiveInt
    num_value_heads: PositiveInt
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    conv_kernel: PositiveInt = 4
    allow_neg_eigval: bool = False
    norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        must_divide("num_key_heads", self.num_key_heads, "num_value_heads", self.num_value_heads)
        return self

    @property
    def key_width(self) -> int:
        """Channels of all queries, or keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of all values."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the convolution: queries, keys, values."""
        return 2 * self.key_width + self.value_width

    @property
    def sections(self) -> list[int]:
        """Columns of the input projection: what is convolved, the output gate z, b and a."""
        return [self.conv_channels, self.value_width, self.num_value_heads, self.num_value_heads]

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        vector = self.conv_channels * self.conv_kernel + 2 * self.num_value_heads + self.value_head_dim
        return Parameters(matrix=width * (sum(self.sections) + self.value_width), vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [
            conv_state(self.conv_channels, self.conv_kernel),
            matrix_state(self.num_value_heads, self.key_head_dim, self.value_head_dim),
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            gemm(step, "input projection", rows, width, sum(self.sections)),
            convolution(step, self.conv_channels, self.conv_kernel),
            pointwise(step, "unit length of q and k", 2 * rows * self.key_width),
            delta_recurrence(
                step,
                "gated delta rule",
                key_heads=self.num_key_heads,
                heads=self.num_value_heads,
                key_dim=self.key_head_dim,
                value_dim=self.value_head_dim,
                decay="scalar",
            ),
            pointwise(step, "gated norm", rows * self.value_width, reads=2),
            gemm(step, "output projection", rows, self.value_width, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        core = delta_held(
            step,
            key_heads=self.num_key_heads,
            heads=self.num_value_heads,
            key_dim=self.key_head_dim,
            value_dim=self.value_head_dim,
            decay="scalar",
        )
        projected, unit = sum(self.sections), 2 * self.key_width
        before = channels_alive(step, projected + self.conv_channels + unit)
        # Of queries and keys a norm keeps what it reads, which in float32 is the convolution's result itself.
        cast = unit if step.fused or step.element_bytes < 4 else 0
        saved = channels_alive(step, projected + self.conv_channels, cast)
        norm = norm_held(step, self.value_width)
        return recurrent_live(step, before, core, norm, self.value_width, saved, self.conv_channels)

    def share(self, cards: int) -> Self:
        heads, groups = shared_heads(self.num_value_heads, self.num_key_heads, cards)
        return self.model_copy(update={"num_value_heads": heads, "num_key_heads": groups})

    @classmethod
    def tiny(cls) -> list[Self]:
        options: list[dict[str, object]] = [
            {"num_key_heads": 2, "num_value_heads": 6, "value_head_dim": 10},
            {"num_key_heads": 3, "num_value_heads": 3, "value_head_dim": 4, "conv_kernel": 2, "allow_neg_eigval": True},
        ]
        return [cls.model_validate({"key_head_dim": 6} | option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_key_heads=8, num_value_heads=16, key_head_dim=128, value_head_dim=128), 1024

    @classmethod
    def other_sizes(cls) -> list[Self]:
        return [cls(num_key_heads=8, num_value_heads=16, key_head_dim=64, value_head_dim=64)]
