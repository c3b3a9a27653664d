"""DeltaNet (Schlag et al., arXiv 2102.11174; Yang et al., arXiv 2406.06484).

    q, k, v = silu(conv(x W));   k = k / |k|;   β = sigmoid(x W_β)
    S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ;   o_t = K^-½ S_tᵀ q_t;   y = norm(o) W_o

With `output_gate`, y = (norm(o) · silu(x W_g)) W_o.
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


class DeltaNet(Block):
    """The delta rule without a decay.

    Attributes:
        num_attention_heads: heads (H).
        key_head_dim: channels of a query and key of one head (K).
        value_head_dim: channels of a value of one head (V).
        conv_kernel: taps of the short convolution over queries, keys and values.
        allow_neg_eigval: β from 0 to 2, so that a write may also flip what is stored (Grazzi et al., arXiv 2411.12537).
        output_gate: multiply the normed output by silu of a projection of the input.
        norm_eps: of the RMSNorm over each head.
    """

    label = "DeltaNet"
    kind: Literal["delta_net"] = "delta_net"
    num_attention_heads: PositiveInt
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    conv_kernel: PositiveInt = 4
    allow_neg_eigval: bool = False
    output_gate: bool = False
    norm_eps: PositiveFloat = 1e-5

    @property
    def key_width(self) -> int:
        """Channels of all queries, or keys."""
        return self.num_attention_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of all values."""
        return self.num_attention_heads * self.value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the convolution: queries, keys, values."""
        return 2 * self.key_width + self.value_width

    @property
    def sections(self) -> list[int]:
        """Columns of the input projection: what is convolved, the output gate, β."""
        return [self.conv_channels, self.value_width if self.output_gate else 0, self.num_attention_heads]

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        vector = self.conv_channels * self.conv_kernel + self.value_head_dim
        return Parameters(matrix=width * (sum(self.sections) + self.value_width), vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [
            conv_state(self.conv_channels, self.conv_kernel),
            matrix_state(self.num_attention_heads, self.key_head_dim, self.value_head_dim),
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            gemm(step, "input projection", rows, width, sum(self.sections)),
            convolution(step, self.conv_channels, self.conv_kernel),
            pointwise(step, "unit length of q and k", 2 * rows * self.key_width),
            delta_recurrence(
                step,
                "delta rule",
                key_heads=self.num_attention_heads,
                heads=self.num_attention_heads,
                key_dim=self.key_head_dim,
                value_dim=self.value_head_dim,
                decay="none",
            ),
            pointwise(step, "norm", rows * self.value_width, reads=1 + self.output_gate),
            gemm(step, "output projection", rows, self.value_width, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        core = delta_held(
            step,
            key_heads=self.num_attention_heads,
            heads=self.num_attention_heads,
            key_dim=self.key_head_dim,
            value_dim=self.value_head_dim,
            decay="none",
        )
        norm = norm_held(step, self.value_width, "silu" if self.output_gate else None)
        projected, unit = sum(self.sections), 2 * self.key_width
        before = channels_alive(step, projected + self.conv_channels + unit)
        # Of queries and keys a norm keeps what it reads, which in float32 is the convolution's result itself.
        cast = unit if step.fused or step.element_bytes < 4 else 0
        saved = channels_alive(step, projected + self.conv_channels, cast)
        return recurrent_live(step, before, core, norm, self.value_width, saved, self.conv_channels)

    @classmethod
    def tiny(cls) -> list[Self]:
        options: list[dict[str, object]] = [
            {"num_attention_heads": 3, "value_head_dim": 10},
            {
                "num_attention_heads": 2,
                "value_head_dim": 4,
                "conv_kernel": 2,
                "output_gate": True,
                "allow_neg_eigval": True,
            },
        ]
        return [cls.model_validate({"key_head_dim": 6} | option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=8, key_head_dim=128, value_head_dim=128), 1024

    @classmethod
    def other_sizes(cls) -> list[Self]:
        return [cls(num_attention_heads=8, key_head_dim=64, value_head_dim=64)]
