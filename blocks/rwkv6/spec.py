"""RWKV-6, "Finch" (Peng et al., arXiv 2404.05892): time mix and channel mix, both over a token shift.

time mix, with dx the token before x minus x:
    m_i = tanh((x + dx · μ_x) A) B_i;    x_i = x + dx · (μ_i + m_i)          for i in w, k, v, r, g
    decay_t = exp(-exp(d + tanh(x_w C) D));    k, v, r = x_i W_i;    g = silu(x_g W_g)
    S_t = Diag(decay_t) S_{t-1} + k_t v_tᵀ;    o_t = (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ r_t
    y = (groupnorm(o) · g) W_o
channel mix:
    y = sigmoid(x_r W_r) · relu(x_k W_k)² W_v,    x_i = x + dx · μ_i
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, must_divide, pointwise
from archcompass.blocks.recurrence import channels_alive, linear_held, linear_recurrence, matrix_state, shift_state
from archcompass.blocks.rwkv4.spec import ChannelMix


class RWKV6TimeMix(Block):
    """RWKV-6's mixer.

    Attributes:
        head_dim: channels of a head (HF head_size); divides the width.
        time_mix_extra_dim: rank of each of the five mixing projections.
        time_decay_extra_dim: rank of the decay's projection.
        norm_eps: of the group norm over each head; (head_size_divisor²) · 1e-5 in the authors' code.
    """

    label = "RWKV-6 time mix"
    kind: Literal["rwkv6_time_mix"] = "rwkv6_time_mix"
    head_dim: PositiveInt = 64
    time_mix_extra_dim: PositiveInt = 32
    time_decay_extra_dim: PositiveInt = 64
    norm_eps: PositiveFloat = 64e-5

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def check(self, width: int) -> None:
        must_divide("head_dim", self.head_dim, "hidden_size", width)

    def parameters(self, width: int) -> Parameters:
        low_rank = 10 * width * self.time_mix_extra_dim + 2 * width * self.time_decay_extra_dim
        # Six mixing vectors, the decay's base, the bonus, and the norm's weight and bias.
        return Parameters(matrix=5 * width * width, vector=low_rank + 10 * width)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [shift_state(width), matrix_state(width // self.head_dim, self.head_dim, self.head_dim)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, mix, decay = step.tokens, self.time_mix_extra_dim, self.time_decay_extra_dim
        return [
            gemm(step, "mixing, down", rows, width, 5 * mix, quantised=False),
            gemm(step, "mixing, up", rows, mix, width, quantised=False, count=5),
            pointwise(step, "token shift", 5 * rows * width, reads=2),
            gemm(step, "decay, down", rows, width, decay, quantised=False),
            gemm(step, "decay, up", rows, decay, width, quantised=False),
            gemm(step, "key, value, receptance and gate", rows, width, width, count=4),
            linear_recurrence(
                step,
                "wkv",
                heads=width // self.head_dim,
                key_dim=self.head_dim,
                value_dim=self.head_dim,
                decay="vector",
                bonus=True,
            ),
            pointwise(step, "gated norm", rows * width, reads=2),
            gemm(step, "output projection", rows, width, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        core = linear_held(
            step, heads=width // self.head_dim, key_dim=self.head_dim, value_dim=self.head_dim, decay="vector"
        )
        ranks = 5 * self.time_mix_extra_dim + self.time_decay_extra_dim
        before = channels_alive(step, 9 * width, width)
        saved = channels_alive(step, 20 * width + 2 * ranks, 2 * width)
        return Live(
            peak_bytes=before + core.peak_bytes,
            saved_bytes=(saved + core.saved_bytes) * step.training,
            backward_bytes=core.backward_bytes * step.training,
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(head_dim=8, time_mix_extra_dim=3, time_decay_extra_dim=5),
            cls(head_dim=16, time_mix_extra_dim=4, time_decay_extra_dim=6, norm_eps=1e-5),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(), 768


class RWKV6ChannelMix(ChannelMix):
    """RWKV-4's channel mixer, but for μ, which is the share of the token before."""

    label = "RWKV-6 channel mix"
    kind: Literal["rwkv6_channel_mix"] = "rwkv6_channel_mix"

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(intermediate_size=50)]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(intermediate_size=2688), 768
