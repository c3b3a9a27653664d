"""Mamba-2 at work. One forward serves prompts, further segments and single steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.runtime import BlockModule, BlockState, Context, FixedState, Linear
from archcompass.kernels.conv import causal_conv
from archcompass.kernels.linear_attention import linear_attention, linear_attention_step
from archcompass.kernels.norm import rms_norm


@dataclass(slots=True)
class Mamba2State(FixedState):
    """conv [batch, kernel - 1, channels], oldest first, and recurrent [batch, heads, state_size, head_dim], float32."""

    conv: Tensor
    recurrent: Tensor


class Mamba2Module(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The input projection's columns are z, then x, B, C, then dt."""

    spec: Mamba2

    def __init__(self, spec: Mamba2, width: int) -> None:
        super().__init__(spec, width)
        self.input = Linear(width, spec.projected_width, bias=spec.use_bias)
        self.conv_weight = nn.Parameter(torch.empty(spec.conv_channels, spec.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(spec.conv_channels)) if spec.use_conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(spec.num_heads))
        self.a_log = nn.Parameter(torch.empty(spec.num_heads))
        self.d = nn.Parameter(torch.empty(spec.num_heads))
        self.norm_weight = nn.Parameter(torch.empty(spec.inner_width)) if spec.norm != "none" else None
        self.output = Linear(spec.inner_width, width, bias=spec.use_bias)
        shared = spec.n_groups * spec.state_size
        self.sections = [spec.inner_width, spec.conv_channels, spec.num_heads]
        self.conv_sections = [spec.inner_width, shared, shared]
        self.group_size = spec.inner_width // (spec.n_groups if spec.norm == "group" else 1)

    def reset_parameters(self) -> None:
        """A from -1 to -16, dt log-uniform in [0.001, 0.1]: the authors' start (arXiv 2405.21060)."""
        bound = self.spec.conv_kernel**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        with torch.no_grad():
            self.a_log.uniform_(1, 16).log_()
            dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        nn.init.ones_(self.d)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, Mamba2State) else None
        real = None if context is None else context.real(x.shape[1], x.device)
        z, conved, dt = self._project(x)
        conved, columns = causal_conv(
            conved if real is None else conved * real,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=None if before is None else before.conv,
        )
        y, recurrent = self._scan(conved, self._time_step(dt, real), None if before is None else before.recurrent)
        y = self.output(self._gate(y, z))
        y = y if self.spec.out_multiplier == 1.0 else y * self.spec.out_multiplier
        keep = context is None or context.keep_state
        return y, Mamba2State(columns, recurrent) if keep else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z [batch, time, inner], what the convolution sees, and dt [batch, time, heads]."""
        projected = self.input(x if self.spec.in_multiplier == 1.0 else x * self.spec.in_multiplier)
        z, conved, dt = projected.split(self.sections, dim=-1)
        if self.spec.multipliers == (1.0,) * 5:
            return z, conved, dt
        on_z, *on_conved, on_dt = self.spec.multipliers
        parts = conved.split(self.conv_sections, dim=-1)
        conved = torch.cat([part * factor for part, factor in zip(parts, on_conved, strict=True)], dim=-1)
        return z * on_z, conved, dt * on_dt

    def _time_step(self, dt: Tensor, real: Tensor | None) -> Tensor:
        """dt [batch, time, heads], at least float32; 0 at padding, so that the state stays as it is."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        low, high = self.spec.time_step_limit
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if low > 0 or high is not None:
            dt = dt.clamp(low, high)
        return dt if real is None else dt * real

    def _scan(self, conved: Tensor, dt: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """S_t = exp(A dt) S_{t-1} + B (dt x)ᵀ, y = Sᵀ C + D x: y [batch, time, inner] and the state after."""
        spec = self.spec
        x, b, c = conved.split(self.conv_sections, dim=-1)
        x = x.unflatten(-1, (spec.num_heads, spec.head_dim))
        b, c = (part.unflatten(-1, (spec.n_groups, spec.state_size)) for part in (b, c))
        decay = -self.a_log.to(dt.dtype).exp() * dt
        value = (x * dt[..., None]).to(x.dtype)
        if before is not None and x.shape[1] == 1:
            y, state = linear_attention_step(c[:, 0], b[:, 0], value[:, 0], decay[:, 0], state=before)
            y = y[:, None]
        else:
            y, state = linear_attention(c, b, value, decay, initial_state=before, chunk_size=spec.chunk_size)
        return y.addcmul_(x, self.d[:, None]).flatten(2), state

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        if self.norm_weight is None:
            return y * F.silu(z)
        return rms_norm(
            y,
            self.norm_weight,
            self.spec.norm_eps,
            gate=z,
            gate_first=not self.spec.norm_before_gate,
            group_size=self.group_size,
        )


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a Mamba-2 spec."""
    assert isinstance(spec, Mamba2)
    return Mamba2Module(spec, width)
