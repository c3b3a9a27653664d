"""RWKV-4 (Peng et al., arXiv 2305.13048): time mix and channel mix, both over a token shift.

time mix, with x' the token before x and μ learned:
    k = (μ_k x + (1 - μ_k) x') W_k, likewise v and r;     w = -exp(time_decay), u = time_first
    wkv_t = (Σ_{i<t} e^{w (t-1-i) + k_i} v_i + e^{u + k_t} v_t) / (Σ_{i<t} e^{w (t-1-i) + k_i} + e^{u + k_t})
    y = (sigmoid(r) · wkv) W_o
channel mix:
    y = sigmoid(r W_r) · relu(k W_k)² W_v,     r and k mixed with the token before as above

The state is numerator, denominator and the exponent both are divided by, per channel, and the token before.
"""

from dataclasses import replace
from typing import Literal, Self

from pydantic import PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.recurrence import channels_alive, diagonal_recurrence, shift_state

SEGMENT = 256  # tokens whose sums are computed together: what they touch stays in a CPU's cache


class RWKV4TimeMix(Block):
    """RWKV-4's mixer.

    Attributes:
        attention_hidden_size: channels of the recurrence (A); None takes the width.
    """

    label = "RWKV-4 time mix"
    kind: Literal["rwkv4_time_mix"] = "rwkv4_time_mix"
    attention_hidden_size: PositiveInt | None = None

    def channels(self, width: int) -> int:
        """Channels of the recurrence."""
        return self.attention_hidden_size or width

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        channels = self.channels(width)
        return Parameters(matrix=4 * width * channels, vector=3 * width + 2 * channels)

    def state(self, width: int, context: int) -> list[StateTensor]:
        sums = ("numerator", "denominator", "exponent")
        shape = (self.channels(width),)
        return [shift_state(width), *(StateTensor(name=n, shape=shape, dtype="fp32", grows=False) for n in sums)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, channels = step.tokens, self.channels(width)
        return [
            pointwise(step, "token shift", 3 * rows * width),
            gemm(step, "key, value and receptance", rows, width, channels, count=3),
            diagonal_recurrence(step, "wkv", channels, rows=2),
            pointwise(step, "receptance gate", rows * channels, reads=3),
            gemm(step, "output projection", rows, channels, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        channels = self.channels(width)
        together = replace(step, new_tokens=min(step.new_tokens, SEGMENT))
        before = channels_alive(step, 4 * width + 2 * channels, 2 * channels)
        return Live(
            peak_bytes=before
            + max(channels_alive(together, 0, 15 * channels), channels_alive(step, 2 * channels, channels)),
            saved_bytes=channels_alive(step, 4 * width + 4 * channels, 17 * channels) * step.training,
            backward_bytes=channels_alive(step, 0, 2 * channels) * step.training,
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(), cls(attention_hidden_size=20)]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(), 768


class ChannelMix(Block):
    """The channel mixer of RWKV-4 and RWKV-6, which sees one token back.

    Attributes:
        intermediate_size: hidden channels (I).
    """

    intermediate_size: PositiveInt

    @property
    def traits(self) -> Traits:
        return Traits(role="channel", mixes_time=True, window=2)

    def parameters(self, width: int) -> Parameters:
        return Parameters(matrix=2 * width * self.intermediate_size + width * width, vector=2 * width)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [shift_state(width)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            pointwise(step, "token shift", 2 * rows * width),
            gemm(step, "key projection", rows, width, self.intermediate_size),
            pointwise(step, "squared ReLU", rows * self.intermediate_size),
            gemm(step, "value projection", rows, self.intermediate_size, width),
            gemm(step, "receptance", rows, width, width),
            pointwise(step, "receptance gate", rows * width, reads=2),
        ]

    def live(self, width: int, step: Step) -> Live:
        hidden = 2 * self.intermediate_size
        return Live(
            peak_bytes=channels_alive(step, 4 * width + hidden),
            saved_bytes=channels_alive(step, 5 * width + hidden) * step.training,
            backward_bytes=channels_alive(step, 3 * self.intermediate_size) * step.training,  # of the square
        )


class RWKV4ChannelMix(ChannelMix):
    """RWKV-4's channel mixer; μ is the share of the token itself."""

    label = "RWKV-4 channel mix"
    kind: Literal["rwkv4_channel_mix"] = "rwkv4_channel_mix"

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(intermediate_size=50)]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(intermediate_size=3072), 768
