"""Lightning attention (Qin et al., arXiv 2405.17381) as MiniMax-01 uses it (arXiv 2501.08313).

    q, k, v = silu(x W);   S_t = exp(-slope_h) S_{t-1} + k_t v_tᵀ;   o_t = S_tᵀ q_t;   y = (norm(o) · sigmoid(x W_g)) W_o

The slopes are those of ALiBi, 2^(-8(h+1)/H), and fade from the first layer to the last:
slope_h · (1 - layer / (layers - 1 + 1e-5) + 1e-5).
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.activations import Activation
from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.recurrence import (
    channels_alive,
    linear_held,
    linear_recurrence,
    matrix_state,
    norm_held,
    recurrent_live,
)


class Lightning(Block):
    """Linear attention with a constant decay per head.

    Attributes:
        num_attention_heads: heads (H).
        head_dim: channels of a query, key and value of one head (D).
        num_hidden_layers: layers of the model, over which the slopes fade; the block's own layer is known when it is built.
        hidden_act: on queries, keys and values.
        norm_eps: of the RMSNorm over all heads; 1e-6 in the released code whatever the model's own norms use.
    """

    label = "lightning attention"
    kind: Literal["lightning"] = "lightning"
    num_attention_heads: PositiveInt
    head_dim: PositiveInt
    num_hidden_layers: PositiveInt
    hidden_act: Activation = "silu"
    norm_eps: PositiveFloat = 1e-6

    @property
    def inner_width(self) -> int:
        """Channels of all heads."""
        return self.num_attention_heads * self.head_dim

    def slopes(self, layer: int) -> tuple[float, ...]:
        """What each head's log decay loses with every token, at depth `layer`."""
        heads = self.num_attention_heads
        fade = 1 - layer / (self.num_hidden_layers - 1 + 1e-5) + 1e-5
        return tuple(2 ** (-8 * (head + 1) / heads) * fade for head in range(heads))

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        return Parameters(matrix=5 * width * self.inner_width, vector=self.inner_width)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [matrix_state(self.num_attention_heads, self.head_dim, self.head_dim)]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, inner, heads = step.tokens, self.inner_width, self.num_attention_heads
        return [
            gemm(step, "qkv projection", rows, width, 3 * inner),
            pointwise(step, "activation", 3 * rows * inner),
            linear_recurrence(
                step,
                "lightning attention",
                heads=heads,
                key_dim=self.head_dim,
                value_dim=self.head_dim,
                decay="constant",
            ),
            gemm(step, "gate projection", rows, width, inner),
            pointwise(step, "gated norm", rows * inner, reads=2),
            gemm(step, "output projection", rows, inner, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        inner = self.inner_width
        core = linear_held(
            step,
            heads=self.num_attention_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            decay="constant",
        )
        norm = norm_held(step, inner, "sigmoid")
        activated = channels_alive(step, 3 * inner)
        gated = norm._replace(peak_bytes=norm.peak_bytes + channels_alive(step, inner))
        # The activation keeps what enters it.
        found = recurrent_live(step, activated, core, gated, inner, 2 * activated)
        return found._replace(peak_bytes=max(found.peak_bytes, 2 * activated))

    def share(self, cards: int) -> Self:
        return self.model_copy(update={"num_attention_heads": -(-self.num_attention_heads // cards)})

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(num_attention_heads=3, head_dim=10, num_hidden_layers=4),
            cls(num_attention_heads=1, head_dim=16, num_hidden_layers=1, hidden_act="gelu"),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=16, head_dim=64, num_hidden_layers=24), 1024
