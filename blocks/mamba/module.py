"""Mamba-1 at work. One forward serves prompts, further segments and single steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.mamba.spec import Mamba
from archcompass.blocks.norm.module import RMSNormModule
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.blocks.runtime import BlockModule, BlockState, Context, FixedState, Linear
from archcompass.blocks.time_mixing import wide
from archcompass.kernels.conv import causal_conv
from archcompass.kernels.decay import LOG2_E
from archcompass.kernels.selective_scan import selective_scan, selective_scan_step


@dataclass(slots=True)
class MambaState(FixedState):
    """conv [batch, kernel - 1, inner], oldest first, and recurrent [batch, inner, state_size], float32."""

    conv: Tensor
    recurrent: Tensor


class MambaModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The input projection's columns are x, then the gate."""

    spec: Mamba

    def __init__(self, spec: Mamba, width: int) -> None:
        super().__init__(spec, width)
        inner = spec.intermediate_size
        self.input = Linear(width, 2 * inner, bias=spec.use_bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, spec.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(inner)) if spec.use_conv_bias else None
        self.select = Linear(inner, sum(spec.sections))
        self.dt = Linear(spec.time_step_rank, inner, bias=True)
        self.a_log = nn.Parameter(torch.empty(inner, spec.state_size))
        self.d = nn.Parameter(torch.empty(inner))
        self.output = Linear(inner, width, bias=spec.use_bias)
        norm = RMSNorm(eps=spec.inner_norm_eps, weight=spec.inner_norm_weight)
        self.norms = nn.ModuleList(RMSNormModule(norm, size) for size in spec.sections) if spec.inner_norms else None

    def reset_parameters(self) -> None:
        """A from -1 to -N along the state, dt log-uniform in [0.001, 0.1] (arXiv 2312.00752, section 3.6)."""
        bound = self.spec.conv_kernel**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.ones_(self.d)
        with torch.no_grad():
            entries = torch.arange(1, self.spec.state_size + 1, dtype=torch.float32, device=self.a_log.device)
            self.a_log.copy_(entries.log().expand_as(self.a_log))

        self._reset_time_step()

    def _reset_time_step(self) -> None:
        with torch.no_grad():
            bias = self.dt.bias
            dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            nn.init.uniform_(self.dt.weight, -(self.spec.time_step_rank**-0.5), self.spec.time_step_rank**-0.5)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, MambaState) else None
        real = None if context is None else context.real(x.shape[1], x.device)
        inner, gate = self.input(x).chunk(2, dim=-1)
        inner, columns = causal_conv(
            inner if real is None else inner * real,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=None if before is None else before.conv,
        )
        y, recurrent = self._scan(inner, gate, real, before)
        keep = context is None or context.keep_state
        return self.output(y), MambaState(columns, recurrent) if keep else None

    def _scan(self, x: Tensor, gate: Tensor, real: Tensor | None, before: MambaState | None) -> tuple[Tensor, Tensor]:
        """y [batch, time, inner], gated, and the state after; at padding dt is 0, so that the state stays as it is."""
        rank, b, c = self.select(x).split(self.spec.sections, dim=-1)
        if self.norms is not None:
            rank, b, c = (norm(part)[0] for norm, part in zip(self.norms, (rank, b, c), strict=True))
        dt = F.softplus(self.dt(rank))
        dt = dt if real is None else dt * real
        decay = -(wide(self.a_log) * LOG2_E).exp2()
        if before is not None and x.shape[1] == 1:
            x, dt, b, c, gate = (part.squeeze(1) for part in (x, dt, b, c, gate))
            y, state = selective_scan_step(x, dt, decay, b, c, self.d, state=before.recurrent, gate=gate)
            return y.unsqueeze(1), state
        initial = None if before is None else before.recurrent
        return selective_scan(x, dt, decay, b, c, self.d, gate=gate, initial_state=initial)


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a Mamba-1 spec."""
    assert isinstance(spec, Mamba)
    return MambaModule(spec, width)
