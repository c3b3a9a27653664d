"""Softmax attention at work. One forward serves prompts, further segments and single steps."""

import torch
from torch import Tensor, nn

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import Block
from archcompass.blocks.norm.module import RMSNormModule
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.blocks.rotary import turn
from archcompass.blocks.runtime import BlockModule, BlockState, Context, GrowingState, Linear
from archcompass.kernels.attention import attention
from archcompass.kernels.norm import rms_norm


class AttentionModule(BlockModule):
    """x [batch, time, width] -> [batch, time, out_width]; state: key and value [batch, tokens, kv_heads, head_dim].

    `out_width` is the width unless a block that contains this one says otherwise.
    """

    spec: Attention

    def __init__(self, spec: Attention, width: int, out_width: int | None = None) -> None:
        super().__init__(spec, width)
        gate = spec.query_width if spec.output_gate else 0
        self.sections = [spec.query_width, gate, spec.key_width, spec.key_width]
        self.qkv = Linear(width, sum(self.sections), bias=spec.qkv_bias)
        self.output = Linear(spec.query_width, out_width or width, bias=spec.output_bias)
        self.query_norm, self.key_norm = self._norm(spec.query_width), self._norm(spec.key_width)
        self.sinks = nn.Parameter(torch.empty(spec.num_attention_heads)) if spec.sinks else None

    def _norm(self, heads_width: int) -> RMSNormModule | None:
        if self.spec.qk_norm == "none":
            return None
        spec = self.spec
        norm = RMSNorm(eps=spec.qk_norm_eps, unit_offset=spec.qk_norm_unit_offset, weight=spec.qk_norm_weight)
        return RMSNormModule(norm, self.spec.head_dim if self.spec.qk_norm == "head" else heads_width)

    def reset_parameters(self) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        x = x if self.spec.in_multiplier == 1.0 else x * self.spec.in_multiplier
        return self.mix(self.qkv(x), state, context)

    def mix(
        self, projected: Tensor, state: BlockState | None, context: Context | None
    ) -> tuple[Tensor, BlockState | None]:
        """All that comes after the first projection: projected [batch, time, queries, gate, keys and values]."""
        context = context or Context(past=len(state) if isinstance(state, GrowingState) else 0)
        heads, value, gate = self._project(projected)
        query, key = self._place(heads, context)
        key, value, state, first = self._remember(key, value, state, context)
        out = self._attend(query, key, value, first, context.padding).flatten(2)
        y = self.output(out if gate is None else out * gate.sigmoid())
        return y if self.spec.out_multiplier == 1.0 else y * self.spec.out_multiplier, state

    def _place(self, heads: tuple[Tensor, ...], context: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys normed, turned and tempered by their positions."""
        spec = self.spec
        if spec.qk_norm == "head" and not spec.qk_norm_after_rope:
            heads = self._normed(*heads)
        heads = tuple(turn(part, spec.rope, context) for part in heads)
        if spec.qk_norm_after_rope:
            heads = self._normed(*heads)
        counts = (spec.num_attention_heads, spec.num_key_value_heads)
        query, key = heads[0].split_with_sizes(counts, dim=2) if len(heads) == 1 else heads
        if spec.temperature_floor_scale is not None:
            steps = context.positions(query.shape[1], query.device).to(torch.promote_types(query.dtype, torch.float32))
            warmth = (
                torch.log1p(torch.floor((steps + 1) / spec.temperature_floor_scale)) * spec.temperature_attn_scale + 1
            )
            query = (query * warmth[..., None, None]).to(query.dtype)
        return query, key

    def _normed(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys, each by its norm, or in one piece, every head by itself."""
        on_query, on_key, spec = self.query_norm, self.key_norm, self.spec
        if on_query is None or on_key is None:
            return heads
        if len(heads) == 2:
            return on_query.normalise(heads[0]), on_key.normalise(heads[1])
        each = [on_query.weight] * spec.num_attention_heads + [on_key.weight] * spec.num_key_value_heads
        weight = torch.cat([part for part in each if part is not None]) if spec.qk_norm_weight else None
        every, offset = heads[0].flatten(2), spec.qk_norm_unit_offset
        every = rms_norm(every, weight, spec.qk_norm_eps, group_size=spec.head_dim, unit_offset=offset)
        return (every.view_as(heads[0]),)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, first: int, padding: Tensor | None) -> Tensor:
        """[batch, time, heads, head_dim]; `first` is the position of the first key."""
        if padding is not None and first and self.spec.attention_chunk_size:
            # Chunks count from each row's first real token, so every row has its own distance to them.
            rows = zip(query.split(1), key.split(1), value.split(1), padding.split(1), strict=True)
            return torch.cat([self._core(*row, first) for row in rows])
        return self._core(query, key, value, padding, first)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, first: int) -> Tensor:
        out = attention(
            query,
            key,
            value,
            window=self.spec.sliding_window,
            chunk=self.spec.attention_chunk_size,
            sinks=self.sinks,
            soft_cap=self.spec.logit_soft_cap,
            scale=self.spec.scale,
            padding=None if padding is None else (padding - first).clamp(min=0),
            key_offset=first if padding is None or len(padding) > 1 else max(0, first - int(padding)),
        )
        assert isinstance(out, Tensor)
        return out

    def _project(self, projected: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Queries and keys, and values [batch, time, heads, head_dim], and the gate [batch, time, query width].

        Queries and keys of a step, where a call of torch costs more than its work, are one piece.
        """
        spec, one_piece = self.spec, projected.shape[1] == 1
        if one_piece and spec.qk_norm != "all" and spec.key_multiplier == 1.0 and not spec.output_gate:
            every = projected.unflatten(-1, (-1, spec.head_dim))
            counts = (spec.num_attention_heads + spec.num_key_value_heads, spec.num_key_value_heads)
            together, value = every.split_with_sizes(counts, dim=2)
            return (together,), value, None
        query, gate, key, value = projected.split_with_sizes(self.sections, dim=-1)
        if spec.qk_norm == "all":
            query, key = self._normed(query, key)
        query, key, value = (part.unflatten(-1, (-1, spec.head_dim)) for part in (query, key, value))
        key = key if spec.key_multiplier == 1.0 else key * spec.key_multiplier
        heads = (torch.cat((query, key), dim=2),) if one_piece else (query, key)
        return heads, value, gate if spec.output_gate else None

    def _remember(
        self, key: Tensor, value: Tensor, state: BlockState | None, context: Context
    ) -> tuple[Tensor, Tensor, BlockState | None, int]:
        """All keys and values the queries may see, the state that holds them, and the position of the first."""
        if not context.keep_state and state is None:
            return key, value, None, 0
        cache = state if isinstance(state, GrowingState) else GrowingState(self._keep(), context.room)
        seen = cache.append(key=key, value=value)
        return seen["key"], seen["value"], cache, cache.first_position

    def _keep(self) -> int | None:
        return self.spec.sliding_window or self.spec.attention_chunk_size


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an attention spec."""
    assert isinstance(spec, Attention)
    return AttentionModule(spec, width)
