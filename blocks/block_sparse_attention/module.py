"""Block-sparse attention at work."""

import torch
from torch import Tensor

from archcompass.blocks.base import Block
from archcompass.blocks.block_sparse_attention.spec import BlockSparseAttention
from archcompass.blocks.rotary import turn
from archcompass.blocks.runtime import (
    BlockModule,
    BlockState,
    CompoundState,
    Context,
    GrowingState,
    Linear,
    part_of,
    row_by_row,
)
from archcompass.kernels.attention import attention, sparse_attention
from archcompass.kernels.cost import ceil_div


class BlockSparseAttentionModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width].

    State: "tokens" holds key and value [batch, tokens, kv_heads, head_dim], "means" those of complete blocks. Blocks count
    from a row's first real token, so rows with padding are computed, and remembered, one by one.
    """

    spec: BlockSparseAttention

    def __init__(self, spec: BlockSparseAttention, width: int) -> None:
        super().__init__(spec, width)
        self.sections = [spec.query_width, spec.key_width, spec.key_width]
        self.qkv = Linear(width, sum(self.sections))
        self.gates = Linear(width, spec.num_attention_heads * spec.branches) if spec.branches > 1 else None
        self.output = Linear(spec.query_width, width)
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        context = context or Context()
        if context.padding is not None:
            return row_by_row(self.forward, x, state, context)
        query, key, value = (
            part.unflatten(-1, (-1, self.spec.head_dim)) for part in self.qkv(x).split(self.sections, dim=-1)
        )
        query, key = turn(query, self.spec.rope, context), turn(key, self.spec.rope, context)
        tokens, means = _states(state, context.room)
        seen = tokens.append(key=key, value=value)
        average = self._averages(seen, means)
        out = self._attend(x, query, seen, average)
        kept = CompoundState({"tokens": tokens, "means": means}) if context.keep_state else None
        return self.output(out.flatten(2)), kept

    def _averages(self, seen: dict[str, Tensor], means: GrowingState) -> dict[str, Tensor]:
        """Means of all complete blocks [batch, blocks, kv_heads, head_dim]; those just completed are added."""
        size, known = self.spec.block_size, len(means)
        complete = seen["key"].shape[1] // size
        names = [name for name, used in (("key", self.spec.keeps_means), ("value", self.spec.compressed)) if used]
        if not names or complete == known:
            return means.tensors()
        fresh = {name: seen[name][:, known * size : complete * size] for name in names}
        return means.append(**{name: part.unflatten(1, (-1, size)).mean(2) for name, part in fresh.items()})

    def _attend(self, x: Tensor, query: Tensor, seen: dict[str, Tensor], means: dict[str, Tensor]) -> Tensor:
        """[batch, time, heads, head_dim]: the attentions, summed by their gates."""
        spec, past = self.spec, seen["key"].shape[1] - x.shape[1]
        position = torch.arange(past, past + x.shape[1], device=x.device)
        scores = self._scores(query, means, position) if means else None
        chosen = self._chosen(scores, position, query, ceil_div(past + x.shape[1], spec.block_size))
        outputs = [sparse_attention(query, seen["key"], seen["value"], chosen, spec.block_size, scale=self.scale)[0]]
        if spec.compressed:
            outputs.append(torch.zeros_like(query) if scores is None else _compressed(scores, means["value"]))
        if spec.sliding_window is not None:
            out = attention(query, seen["key"], seen["value"], window=spec.sliding_window, scale=self.scale)
            assert isinstance(out, Tensor)
            outputs.append(out)
        if self.gates is None:
            return outputs[0]
        gates = self.gates(x).sigmoid().unflatten(-1, (len(outputs), -1, 1))
        return torch.stack([gates[:, :, i] * out for i, out in enumerate(outputs)]).sum(0)

    def _scores(self, query: Tensor, means: dict[str, Tensor], position: Tensor) -> Tensor:
        """[batch, time, kv_heads, group, blocks]: q · mean(k); minus infinity for blocks not complete at the query."""
        key, size = means["key"], self.spec.block_size
        grouped = query.unflatten(2, (key.shape[2], -1)).transpose(1, 2)  # [batch, kv_heads, time, group, D]
        scores = grouped.flatten(2, 3) @ key.permute(0, 2, 3, 1) * self.scale
        scores = torch.unflatten(scores, 2, grouped.shape[2:4]).transpose(1, 2)
        unfinished = torch.arange(1, key.shape[1] + 1, device=query.device) * size > position[:, None] + 1
        return scores.masked_fill(unfinished[:, None, None], float("-inf"))

    def _chosen(self, scores: Tensor | None, position: Tensor, query: Tensor, blocks: int) -> Tensor:
        """[batch, time, kv_heads, slots] of so many blocks, none twice, -1 for none."""
        spec = self.spec
        own, device = position[:, None] // spec.block_size, position.device
        parts = [own - torch.arange(spec.local_blocks, device=device)]
        earlier = own - spec.local_blocks  # blocks up to here are not among the local ones
        first = torch.arange(spec.global_blocks, device=device)[None]
        parts.append(first.masked_fill(first > earlier, -1))
        if spec.stride is not None:
            strided = torch.arange(0, blocks, spec.stride, device=device)[None]
            parts.append(strided.masked_fill((strided > earlier) | (strided < spec.global_blocks), -1))
        fixed = torch.cat([part.expand(own.shape[0], -1).clamp(min=-1) for part in parts], dim=1)
        shape = (query.shape[0], -1, spec.num_key_value_heads, -1)
        fixed = fixed[None, :, None].expand(*shape)
        if scores is None or not spec.topk_blocks:
            return fixed
        return torch.cat([fixed, self._best(scores.detach().sum(3), own)], dim=-1)

    def _best(self, scores: Tensor, own: Tensor) -> Tensor:
        """The blocks of the highest scores [batch, time, kv_heads, blocks] that no pattern has taken already."""
        spec, block = self.spec, torch.arange(scores.shape[-1], device=scores.device)
        taken = (block > own - spec.local_blocks) | (block < spec.global_blocks)
        if spec.stride is not None:
            taken = taken | (block % spec.stride == 0)
        best = scores.masked_fill(taken[:, None], float("-inf")).topk(min(spec.topk_blocks, scores.shape[-1]), dim=-1)
        return best.indices.masked_fill(best.values == float("-inf"), -1)


def _states(state: BlockState | None, room: int) -> tuple[GrowingState, GrowingState]:
    tokens, means = part_of(state, "tokens"), part_of(state, "means")
    if isinstance(tokens, GrowingState) and isinstance(means, GrowingState):
        return tokens, means
    return GrowingState(room=room), GrowingState()


def _compressed(scores: Tensor, value: Tensor) -> Tensor:
    """Attention over block means; nothing where no block is complete yet: [batch, time, heads, head_dim]."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    empty = torch.isneginf(wide).all(-1, keepdim=True)
    weights = wide.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(value.dtype)
    time, group = weights.shape[1], weights.shape[3]
    rows = weights.transpose(1, 2).flatten(2, 3) @ value.transpose(1, 2)  # [batch, kv_heads, time * group, D]
    return torch.unflatten(rows, 2, (time, group)).transpose(1, 2).flatten(2, 3)


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of block-sparse attention."""
    assert isinstance(spec, BlockSparseAttention)
    return BlockSparseAttentionModule(spec, width)
