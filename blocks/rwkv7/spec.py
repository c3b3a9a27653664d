"""RWKV-7, "Goose" (Peng et al., arXiv 2503.14456): time mix and channel mix, both over a token shift.

time mix, with x_i = x + dx · μ_i and dx the token before x minus x, for i in r, w, k, v, a, g:
    r, k, v = x_i W_i;     v = v + (v_first - v) · sigmoid(v_0 + x_v V_1 V_2)      from the second layer on
    decay = exp(-exp(-softplus(-(w_0 + tanh(x_w W_1) W_2)) - ½));     a = sigmoid(a_0 + x_a A_1 A_2)
    κ = (k · k_k) / |k · k_k| per head;     k = k · (1 + (a - 1) · k_a)
    S_t = Diag(decay_t) S_{t-1} - (a_t κ_t) (κ_tᵀ S_{t-1}) + k_t v_tᵀ;     o_t = S_tᵀ r_t
    y = ((groupnorm(o) + (Σ r k r_k) v) · sigmoid(x_g G_1) G_2) W_o
channel mix:
    y = relu(x_k W_k)² W_v
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, must_divide, pointwise
from archcompass.blocks.recurrence import channels_alive, low_rank_held, low_rank_recurrence, matrix_state, shift_state


class RWKV7TimeMix(Block):
    """RWKV-7's mixer.

    Attributes:
        head_dim: channels of a head; divides the width.
        decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim: ranks of the projections of decay, in-context
            learning rate, value residual and output gate.
        first: this is the model's first layer: it leaves its values to those above instead of mixing theirs in, and has no
            weights for that.
        norm_eps: of the group norm over each head.
    """

    label = "RWKV-7 time mix"
    kind: Literal["rwkv7_time_mix"] = "rwkv7_time_mix"
    head_dim: PositiveInt = 64
    decay_low_rank_dim: PositiveInt = 64
    a_low_rank_dim: PositiveInt = 64
    v_low_rank_dim: PositiveInt = 32
    gate_low_rank_dim: PositiveInt = 128
    first: bool = False
    norm_eps: PositiveFloat = 64e-5

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every low-rank projection this layer has, by what it is for."""
        ranks = {"decay": self.decay_low_rank_dim, "learning rate": self.a_low_rank_dim}
        ranks |= {} if self.first else {"value residual": self.v_low_rank_dim}
        return ranks | {"gate": self.gate_low_rank_dim}

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def check(self, width: int) -> None:
        must_divide("head_dim", self.head_dim, "hidden_size", width)

    def parameters(self, width: int) -> Parameters:
        # Six mixing vectors, k_k, k_a and r_k, the norm's weight and bias, and a base for every low rank but the gate's.
        vectors = 6 + 3 + 2 + len(self.ranks) - 1
        return Parameters(matrix=4 * width * width, vector=2 * width * sum(self.ranks.values()) + vectors * width)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [shift_state(width), matrix_state(width // self.head_dim, self.head_dim, self.head_dim)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        low_rank = [
            gemm(step, f"{name}, {way}", rows, *((width, rank) if way == "down" else (rank, width)), quantised=False)
            for name, rank in self.ranks.items()
            for way in ("down", "up")
        ]
        return [
            pointwise(step, "token shift", 6 * rows * width),
            gemm(step, "receptance, key and value", rows, width, width, count=3),
            *low_rank,
            pointwise(step, "key and decay", 3 * rows * width),
            low_rank_recurrence(step, "wkv", heads=width // self.head_dim, head_dim=self.head_dim),
            pointwise(step, "norm, bonus and gate", rows * width, reads=5),
            gemm(step, "output projection", rows, width, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        core = low_rank_held(step, heads=width // self.head_dim, head_dim=self.head_dim)
        before = channels_alive(step, 14 * width, width)
        drawn = 0 if self.first else 3 * width  # values on their way to the first layer's
        saved = channels_alive(step, 19 * width + drawn + sum(self.ranks.values()), width)
        flowing = channels_alive(step, 0, 3 * width)  # where the bonus and the recurrence's result come together
        return Live(
            peak_bytes=before + core.peak_bytes,
            saved_bytes=(saved + core.saved_bytes) * step.training,
            backward_bytes=flowing * step.training,
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        ranks = {"decay_low_rank_dim": 5, "a_low_rank_dim": 4, "v_low_rank_dim": 3, "gate_low_rank_dim": 6}
        options: list[dict[str, object]] = [{"head_dim": 8}, {"head_dim": 16, "first": True, "norm_eps": 1e-5}]
        return [cls.model_validate(ranks | option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(), 768


class RWKV7ChannelMix(Block):
    """RWKV-7's channel mixer, which sees one token back.

    Attributes:
        intermediate_size: hidden channels (I).
    """

    label = "RWKV-7 channel mix"
    kind: Literal["rwkv7_channel_mix"] = "rwkv7_channel_mix"
    intermediate_size: PositiveInt

    @property
    def traits(self) -> Traits:
        return Traits(role="channel", mixes_time=True, window=2)

    def parameters(self, width: int) -> Parameters:
        return Parameters(matrix=2 * width * self.intermediate_size, vector=width)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [shift_state(width)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        return [
            pointwise(step, "token shift", rows * width),
            gemm(step, "key projection", rows, width, self.intermediate_size),
            pointwise(step, "squared ReLU", rows * self.intermediate_size),
            gemm(step, "value projection", rows, self.intermediate_size, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        hidden = 2 * self.intermediate_size
        return Live(
            peak_bytes=channels_alive(step, width + hidden),
            saved_bytes=channels_alive(step, 2 * width + hidden) * step.training,
            backward_bytes=channels_alive(step, 3 * self.intermediate_size) * step.training,  # of the square
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        return [cls(intermediate_size=50)]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(intermediate_size=3072), 768
