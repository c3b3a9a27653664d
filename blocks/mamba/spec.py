"""Mamba-1 (Gu and Dao, arXiv 2312.00752): a selective state space layer.

    x, z = u W_in;   x = silu(conv(x));   dt, B, C = x W_x;   dt = softplus(dt W_dt + b)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;   y_t = C_t · h_t + D x_t;   out = (y · silu(z)) W_out

The state is state_size numbers per channel and the last inputs of a short convolution, however long the context.
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, costed, gemm, pointwise
from archcompass.blocks.recurrence import channels_alive
from archcompass.kernels.conv.cost import causal_conv_cost
from archcompass.kernels.selective_scan.cost import selective_scan_cost
from archcompass.kernels.selective_scan.memory import selective_scan_held


class Mamba(Block):
    """A state space mixer with a decay of its own for every channel and state entry.

    Attributes:
        intermediate_size: inner channels (I), usually twice the width.
        state_size: state entries of a channel (N).
        conv_kernel: taps of the convolution; the state keeps one column fewer.
        time_step_rank: channels that dt is projected through (R), usually width / 16.
        use_bias: biases of the input and output projections.
        use_conv_bias: bias of the convolution.
        inner_norms: RMSNorm on dt, B and C before they are used (Jamba).
        inner_norm_eps: its epsilon.
        inner_norm_weight: whether it has weights (Falcon Mamba has none).
    """

    label = "Mamba-1"
    kind: Literal["mamba"] = "mamba"
    intermediate_size: PositiveInt
    state_size: PositiveInt = 16
    conv_kernel: PositiveInt = 4
    time_step_rank: PositiveInt
    use_bias: bool = False
    use_conv_bias: bool = True
    inner_norms: bool = False
    inner_norm_eps: PositiveFloat = 1e-6
    inner_norm_weight: bool = True

    @property
    def sections(self) -> tuple[int, int, int]:
        """Columns of the projection of x: dt's rank, B, C."""
        return self.time_step_rank, self.state_size, self.state_size

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True)

    def parameters(self, width: int) -> Parameters:
        inner, rank, chosen = self.intermediate_size, self.time_step_rank, sum(self.sections)
        vector = inner * (self.conv_kernel + self.use_conv_bias)
        vector += inner * (self.state_size + 2)
        vector += 2 * inner + width if self.use_bias else 0
        vector += chosen if self.inner_norms and self.inner_norm_weight else 0
        return Parameters(matrix=inner * (3 * width + chosen + rank), vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        conv, recurrent = (self.conv_kernel - 1, self.intermediate_size), (self.intermediate_size, self.state_size)
        return [
            StateTensor(name="conv", shape=conv, dtype="activations", grows=False),
            StateTensor(name="recurrent", shape=recurrent, dtype="fp32", grows=False),
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, inner = step.tokens, self.intermediate_size
        return [
            gemm(step, "input projection", rows, width, 2 * inner),
            self._conv(step),
            gemm(step, "time step, B and C projection", rows, inner, sum(self.sections)),
            *([pointwise(step, "inner norms", rows * sum(self.sections))] if self.inner_norms else []),
            gemm(step, "time step expansion", rows, self.time_step_rank, inner),
            pointwise(step, "time step", rows * inner),
            self._scan(step),
            gemm(step, "output projection", rows, inner, width),
        ]

    def _conv(self, step: Step) -> Op:
        """Shape is (batch, new tokens, channels, taps)."""
        channels, taps = self.intermediate_size, self.conv_kernel
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
        """Shape is (batch, new tokens, channels, state_size)."""
        inner, entries = self.intermediate_size, self.state_size
        cost = selective_scan_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            channels=inner,
            state_dim=entries,
            element_bytes=step.element_bytes,
        )
        shape = (step.batch, step.new_tokens, inner, entries)
        return costed(step, "selective_scan", "selective scan", cost, shape, weights=inner * (entries + 1))

    def live(self, width: int, step: Step) -> Live:
        inner, entries = self.intermediate_size, self.state_size
        core = selective_scan_held(
            batch=step.batch,
            new_tokens=step.new_tokens,
            channels=inner,
            state_dim=entries,
            element_bytes=step.element_bytes,
            fused=step.fused,
        )
        before = channels_alive(step, 4 * inner + sum(self.sections))
        # Of the time step what enters the softplus is kept as well, and of the result what enters the output projection.
        saved = before + channels_alive(step, 2 * inner) + core.saved_bytes
        return Live(
            peak_bytes=before + core.peak_bytes,
            saved_bytes=saved * step.training,
            backward_bytes=core.backward_bytes * step.training,
        )

    def share(self, cards: int) -> Self:
        return self.model_copy(update={"intermediate_size": -(-self.intermediate_size // cards)})

    @classmethod
    def tiny(cls) -> list[Self]:
        return [
            cls(intermediate_size=48, time_step_rank=4, state_size=8),
            cls(intermediate_size=32, time_step_rank=3, use_bias=True, use_conv_bias=False, conv_kernel=2),
            cls(intermediate_size=40, time_step_rank=4, state_size=6, inner_norms=True),
            cls(intermediate_size=24, time_step_rank=4, inner_norms=True, inner_norm_weight=False),
        ]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(intermediate_size=1536, state_size=16, time_step_rank=48), 768
