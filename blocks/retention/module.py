"""Retention at work. One forward serves prompts, further segments and single steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from archcompass.blocks.base import Block
from archcompass.blocks.retention.spec import Retention
from archcompass.blocks.runtime import BlockModule, BlockState, Context, FixedState, Linear
from archcompass.blocks.time_mixing import constant, hide, keeps, recall
from archcompass.kernels.norm import rms_norm
from archcompass.kernels.rope import rotate


@dataclass(slots=True)
class RetentionState(FixedState):
    """recurrent [batch, heads, key_head_dim, value_head_dim], float32, and the number of tokens it has seen."""

    recurrent: Tensor
    past: int

    def tensors(self) -> dict[str, Tensor]:
        return {"recurrent": self.recurrent}

    def copy(self) -> "RetentionState":
        return RetentionState(self.recurrent.clone(), self.past)


class RetentionModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The columns of the input projection are q, k, v, gate."""

    spec: Retention

    def __init__(self, spec: Retention, width: int) -> None:
        super().__init__(spec, width)
        self.sections = [spec.key_width, spec.key_width, spec.value_width, spec.value_width]
        self.input = Linear(width, sum(self.sections))
        self.output = Linear(spec.value_width, width)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, RetentionState) else None
        context = context or Context(past=0 if before is None else before.past)
        parts = self.input(hide(x, context)).split(self.sections, dim=-1)
        q, k, v, gate = (part.unflatten(-1, (self.spec.num_attention_heads, -1)) for part in parts)
        cosine, sine = self._table(context, x)
        q, k = (rotate(part, cosine, sine, interleaved=True) for part in (q, k))
        log_decay = constant(self.spec.log_decay, x.device, torch.promote_types(x.dtype, torch.float32))
        scale = self.spec.key_head_dim**-0.5
        y, recurrent = recall(q, k, v, log_decay, None if before is None else before.recurrent, scale=scale)
        y = rms_norm(y, None, self.spec.norm_eps, gate=gate, gate_first=False)
        after = RetentionState(recurrent, context.past + x.shape[1]) if keeps(context) else None
        return self.output(y.flatten(2)), after

    def _table(self, context: Context, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [batch or 1, time, key_head_dim / 2] of the new positions, once per call for all layers."""
        key = ("retention", self.spec.key_head_dim, x.shape[1], x.dtype)
        if key not in context.tables:
            # In float64: a stream has no end, and float32 positions would turn by the wrong angle after some thousands.
            frequencies = constant(self.spec.frequencies, x.device, torch.float64)
            angles = context.positions(x.shape[1], x.device)[..., None] * frequencies
            context.tables[key] = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        cosine, sine = context.tables[key]
        return cosine, sine


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a retention spec."""
    assert isinstance(spec, Retention)
    return RetentionModule(spec, width)
