"""The recurrent block of Griffin and Hawk (De et al., arXiv 2402.19427): a real-gated linear recurrent unit.

    u = conv(x W_x + b);    i = sigmoid(u W_i + b_i), r = sigmoid(u W_r + b_r), block-diagonal
    a = exp(-8 r softplus(Λ));    h_t = a_t h_{t-1} + √(1 - a_t²) (i_t u_t);    y = (h · gelu(x W_y + b)) W_o + b

The first token of a sequence enters whole, without the root.
"""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from archcompass.blocks.activations import Activation
from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, must_divide, pointwise
from archcompass.blocks.recurrence import channels_alive, conv_state, convolution, diagonal_held, diagonal_recurrence


class RGLRU(Block):
    """A diagonal recurrence with gates.

    Attributes:
        lru_width: channels of the recurrence (R).
        num_attention_heads: blocks of the two gates' block-diagonal matrices; divides lru_width.
        conv1d_width: taps of the short convolution.
        hidden_activation: of the output gate.
    """

    label = "RG-LRU"
    kind: Literal["rg_lru"] = "rg_lru"
    lru_width: PositiveInt
    num_attention_heads: PositiveInt
    conv1d_width: PositiveInt = 4
    hidden_activation: Activation = "gelu_tanh"

    @model_validator(mode="after")
    def _blocks_divide(self) -> Self:
        must_divide("num_attention_heads", self.num_attention_heads, "lru_width", self.lru_width)
        return self

    @property
    def block_width(self) -> int:
        """Channels that one block of a gate's matrix mixes."""
        return self.lru_width // self.num_attention_heads

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        channels = self.lru_width
        gates = 2 * channels * self.block_width
        # Biases of both input projections, the convolution and both gates; Λ; the bias of the output.
        vector = channels * (self.conv1d_width + 6) + width
        return Parameters(matrix=3 * width * channels + gates, vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        recurrent = StateTensor(name="recurrent", shape=(self.lru_width,), dtype="fp32", grows=False)
        return [conv_state(self.lru_width, self.conv1d_width), recurrent]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, channels, block = step.tokens, self.lru_width, self.block_width
        return [
            gemm(step, "input projection", rows, width, 2 * channels),
            convolution(step, channels, self.conv1d_width, bias=True),
            gemm(step, "gates", rows, block, 2 * block).together(self.num_attention_heads),
            pointwise(step, "decay and input", rows * channels, reads=3, writes=2),
            diagonal_recurrence(step, "recurrence", channels),
            pointwise(step, "output gate", rows * channels, reads=2),
            gemm(step, "output projection", rows, channels, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        channels, core = self.lru_width, diagonal_held(step, self.lru_width)
        saved = channels_alive(step, 9 * channels, 6 * channels) + core.saved_bytes
        return Live(
            peak_bytes=channels_alive(step, 3 * channels, 2 * channels) + core.peak_bytes,
            saved_bytes=saved * step.training,
            backward_bytes=core.backward_bytes * step.training,
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(lru_width=30, num_attention_heads=3),
            cls(lru_width=8, num_attention_heads=1, conv1d_width=2, hidden_activation="silu"),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(lru_width=1024, num_attention_heads=8), 1024
