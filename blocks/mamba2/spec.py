"""Mamba-2 (Dao and Gu, arXiv 2405.21060): a state space layer that is decayed linear attention.

    z, xBC, dt = x W_in;   x, B, C = silu(conv(xBC));   dt = softplus(dt + b)
    S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)ᵀ;   y_t = S_tᵀ C_t + D x_t;   out = norm(y · silu(z)) W_out

The state is one matrix [state_size, head_dim] per head and the last inputs of a short convolution, however long the context.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import (
    Block,
    Live,
    Op,
    Parameters,
    StateTensor,
    Step,
    Traits,
    costed,
    gemm,
    must_divide,
    pointwise,
    shared_heads,
)
from archcompass.blocks.recurrence import channels_alive, linear_held, norm_held, recurrent_live
from archcompass.errors import SpecError
from archcompass.kernels.conv.cost import causal_conv_cost
from archcompass.kernels.linear_attention.cost import linear_attention_cost


def _no_bound(value: Any) -> Any:
    """Infinity, which JSON cannot write, is None."""
    return None if isinstance(value, float) and math.isinf(value) else value


UpperLimit = Annotated[PositiveFloat | None, BeforeValidator(_no_bound)]


class Mamba2(Block):
    """A state space mixer with heads.

    Attributes:
        num_heads: heads (H).
        head_dim: channels of a head (P); num_heads · head_dim is the inner width.
        state_size: rows of a head's state (N).
        n_groups: heads share B and C within a group (G); divides num_heads.
        conv_kernel: taps of the convolution; the state keeps one column fewer.
        chunk_size: tokens per chunk of the parallel form, a power of two or None for the kernel's own; the results do not
            depend on it.
        time_step_limit: dt is clamped to [low, high]; None as the upper limit is no bound.
        norm: RMSNorm after the gate, over each group's channels ("group"), over all ("all"), or none (y · silu(z) alone).
        norm_before_gate: norm(y) · silu(z) rather than norm(y · silu(z)).
        norm_eps: the norm's epsilon (HF layer_norm_epsilon).
        use_bias: biases of the two projections.
        use_conv_bias: bias of the convolution.
        in_multiplier, out_multiplier: constants on the block's input and output (Falcon-H1).
        multipliers: constants on z, x, B, C and dt right after the projection (Falcon-H1's ssm_multipliers).
    """

    label = "Mamba-2"
    kind: Literal["mamba2"] = "mamba2"
    num_heads: PositiveInt
    head_dim: PositiveInt = 64
    state_size: PositiveInt = 128
    n_groups: PositiveInt = 1
    conv_kernel: PositiveInt = 4
    chunk_size: PositiveInt | None = None
    time_step_limit: tuple[NonNegativeFloat, UpperLimit] = (0.0, None)
    norm: Literal["group", "all", "none"] = "group"
    norm_before_gate: bool = False
    norm_eps: PositiveFloat = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    in_multiplier: float = 1.0
    out_multiplier: float = 1.0
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        must_divide("n_groups", self.n_groups, "num_heads", self.num_heads)
        if self.chunk_size is not None and self.chunk_size & (self.chunk_size - 1):
            raise SpecError(
                f"chunk_size ({self.chunk_size}) must be a power of two; nearest: {2 ** round(math.log2(self.chunk_size))}"
            )
        low, high = self.time_step_limit
        if high is not None and high <= low:
            raise SpecError(f"time_step_limit is {low} to {high}; the upper limit must be above the lower")
        return self

    @property
    def inner_width(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.inner_width + 2 * self.n_groups * self.state_size

    @property
    def projected_width(self) -> int:
        """Columns of the input projection: z, then x, B, C, then dt."""
        return self.inner_width + self.conv_channels + self.num_heads

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        vector = self.conv_channels * (self.conv_kernel + self.use_conv_bias) + 3 * self.num_heads
        vector += self.inner_width if self.norm != "none" else 0
        vector += self.projected_width + width if self.use_bias else 0
        return Parameters(matrix=width * (self.projected_width + self.inner_width), vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        conv = (self.conv_kernel - 1, self.conv_channels)
        recurrent = (self.num_heads, self.state_size, self.head_dim)
        return [
            StateTensor(name="conv", shape=conv, dtype="activations", grows=False),
            StateTensor(name="recurrent", shape=recurrent, dtype="fp32", grows=False),
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, inner = step.tokens, self.inner_width
        return [
            gemm(step, "input projection", rows, width, self.projected_width),
            self._conv(step),
            pointwise(step, "time step and decay", rows * (inner + self.num_heads)),
            self._scan(step),
            pointwise(step, "skip and gated norm", rows * inner, reads=3),
            gemm(step, "output projection", rows, inner, width),
        ]

    def _conv(self, step: Step) -> Op:
        """Shape is (batch, new tokens, channels, taps)."""
        channels, taps = self.conv_channels, self.conv_kernel
        cost = causal_conv_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            channels=channels,
            width=taps,
            element_bytes=step.element_bytes,
        )
        shape = (step.batch, step.new_tokens, channels, taps)
        return costed(step, "conv", "convolution", cost, shape, weights=channels * (taps + self.use_conv_bias))

    def _scan(self, step: Step) -> Op:
        """Shape is (batch, new tokens, groups, heads, state_size, head_dim)."""
        cost = linear_attention_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            key_groups=self.n_groups,
            heads=self.num_heads,
            key_dim=self.state_size,
            value_dim=self.head_dim,
            decay="scalar",
            element_bytes=step.element_bytes,
            chunk_size=self.chunk_size,
        )
        shape = (step.batch, step.new_tokens, self.n_groups, self.num_heads, self.state_size, self.head_dim)
        return costed(step, "scan", "state space scan", cost, shape)

    def live(self, width: int, step: Step) -> Live:
        core = linear_held(
            step,
            heads=self.num_heads,
            groups=self.n_groups,
            key_dim=self.state_size,
            value_dim=self.head_dim,
            decay="scalar",
            chunk=self.chunk_size,
        )
        norm = norm_held(step, self.inner_width)
        narrow = self.projected_width + self.conv_channels + self.inner_width
        before, saved = (channels_alive(step, narrow, kept * self.num_heads) for kept in (2, 8))
        return recurrent_live(step, before, core, norm, self.inner_width, saved, self.conv_channels)

    def share(self, cards: int) -> Self:
        heads, groups = shared_heads(self.num_heads, self.n_groups, cards)
        return self.model_copy(update={"num_heads": heads, "n_groups": groups})

    @classmethod
    def tiny(cls) -> list[Self]:
        options: list[dict[str, object]] = [
            {"num_heads": 4, "head_dim": 8, "state_size": 16, "chunk_size": 16},
            {"num_heads": 6, "head_dim": 8, "state_size": 12, "n_groups": 2, "use_bias": True, "use_conv_bias": False},
            {
                "num_heads": 4,
                "head_dim": 16,
                "state_size": 8,
                "n_groups": 2,
                "norm": "all",
                "time_step_limit": (0.01, 0.5),
            },
            {"num_heads": 2, "head_dim": 8, "state_size": 8, "norm": "none", "conv_kernel": 2, "in_multiplier": 1.5},
            {"num_heads": 2, "head_dim": 8, "state_size": 8, "norm_before_gate": True, "out_multiplier": 0.5}
            | {"multipliers": (0.5, 1.5, 0.7, 1.2, 0.9)},
        ]
        return [cls.model_validate(option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_heads=32, head_dim=64, state_size=128), 1024
