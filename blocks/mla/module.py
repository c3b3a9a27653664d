"""Multi-head latent attention at work: expanded for prompts, absorbed for steps, over one cache of latents."""

import torch
from torch import Tensor

from archcompass.blocks.base import Block
from archcompass.blocks.mla.indexer import LightningIndexer, selected_weights
from archcompass.blocks.mla.spec import MLA
from archcompass.blocks.norm.module import RMSNormModule
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.blocks.rotary import turn
from archcompass.blocks.runtime import BlockModule, BlockState, Context, GrowingState, Linear
from archcompass.kernels.attention import attention, latent_attention, sparse_attention


class MLAModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width].

    State: latent [batch, tokens, kv_lora_rank + qk_rope_head_dim], and index_key [batch, tokens, head_dim] with an indexer.
    The first projection's columns are queries (or their latent), the latent, the shared part of the key.
    """

    spec: MLA

    def __init__(self, spec: MLA, width: int) -> None:
        super().__init__(spec, width)
        heads, norm = spec.num_attention_heads, RMSNorm(eps=spec.norm_eps)
        self.inward = Linear(width, sum(spec.sections), bias=spec.bias)
        self.query_norm = RMSNormModule(norm, spec.q_lora_rank) if spec.q_lora_rank else None
        self.query = Linear(spec.q_lora_rank, heads * spec.qk_head_dim) if spec.q_lora_rank else None
        self.latent_norm = RMSNormModule(norm, spec.kv_lora_rank)
        self.expand = Linear(spec.kv_lora_rank, heads * (spec.qk_nope_head_dim + spec.v_head_dim))
        self.output = Linear(heads * spec.v_head_dim, width, bias=spec.bias)
        self.indexer = LightningIndexer(spec, width) if spec.indexer else None

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        context = context or Context(past=len(state) if isinstance(state, GrowingState) else 0)
        query, query_latent, latent = self._project(x, context)
        new = {"latent": latent}
        if self.indexer is not None:
            new["index_key"] = self.indexer.keys(x.detach(), context)
        seen, state = self._remember(new, state, context)
        if self.indexer is not None and (self.training or self.spec.selects(seen["latent"].shape[1])):
            out = self._selected(query, seen, self.indexer(x.detach(), query_latent.detach(), seen, context), context)
        elif self.spec.absorbs(x.shape[1], seen["latent"].shape[1]):
            out = self._absorbed(query, seen["latent"], context)
        else:
            out = self._expanded(query, seen["latent"], context)
        return self.output(out.flatten(2)), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, time, heads, qk_head_dim], their latent, and what is to be cached [batch, time, cached_width]."""
        spec = self.spec
        queries, latent, shared = self.inward(x).split(spec.sections, dim=-1)
        if self.query is not None and self.query_norm is not None:
            query_latent = self.query_norm.normalise(queries)
            queries = self.query(query_latent)
        else:
            query_latent = queries
        query = queries.unflatten(-1, (spec.num_attention_heads, -1))
        if spec.rope is not None:
            plain, turned = query.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
            query = torch.cat([plain, turn(turned, spec.rope, context)], dim=-1)
            shared = turn(shared.unsqueeze(2), spec.rope, context).squeeze(2)
        return query, query_latent, torch.cat([self.latent_norm.normalise(latent), shared], dim=-1)

    def _remember(
        self, new: dict[str, Tensor], state: BlockState | None, context: Context
    ) -> tuple[dict[str, Tensor], BlockState | None]:
        if not context.keep_state and state is None:
            return new, None
        cache = state if isinstance(state, GrowingState) else GrowingState(room=context.room)
        return cache.append(**new), cache

    def _expanded(self, query: Tensor, rows: Tensor, context: Context) -> Tensor:
        """Keys and values of every head, made from the latents: [batch, time, heads, v_head_dim]."""
        spec = self.spec
        latent, shared = rows.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        made = self.expand(latent).unflatten(-1, (spec.num_attention_heads, -1))
        key, value = made.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        key = torch.cat([key, shared.unsqueeze(2).expand(-1, -1, spec.num_attention_heads, -1)], dim=-1)
        out = attention(query, key, value, scale=spec.softmax_scale, padding=context.padding)
        assert isinstance(out, Tensor)
        return out

    def _absorbed(self, query: Tensor, rows: Tensor, context: Context) -> Tensor:
        """One key and value head, the latents themselves; every head brings its own query into their space."""
        rank, scale = self.spec.kv_lora_rank, self.spec.softmax_scale
        out = latent_attention(self._into_latent(query), rows, rank, scale=scale, padding=context.padding)
        return self._out_of_latent(out)

    def _selected(
        self, query: Tensor, seen: dict[str, Tensor], selection: tuple[Tensor, Tensor, Tensor], context: Context
    ) -> Tensor:
        """As `_absorbed`, over the keys that the indexer picked."""
        scores, index, counts = selection
        rows, into = seen["latent"], self._into_latent(query)
        keys, blocks = rows.unsqueeze(2), index.masked_fill(~counts, -1).unsqueeze(2)
        values = keys[..., : self.spec.kv_lora_rank]
        out, lse = sparse_attention(into, keys, values, blocks, 1, scale=self.spec.softmax_scale)
        if self.training and self.indexer is not None:
            weights = selected_weights(
                into.detach(), rows.detach(), index, counts, lse.detach(), self.spec.softmax_scale
            )
            self.indexer.learn(scores, counts, weights, context)
        return self._out_of_latent(out)

    def _into_latent(self, query: Tensor) -> Tensor:
        """[batch, time, heads, qk_head_dim] -> [batch, time, heads, cached_width]: q W_ukᵀ beside the part that turned."""
        plain, turned = query.split([self.spec.qk_nope_head_dim, self.spec.qk_rope_head_dim], dim=-1)
        return torch.cat([_per_head(plain, self._expansion()[0]), turned], dim=-1)

    def _out_of_latent(self, out: Tensor) -> Tensor:
        """[batch, time, heads, kv_lora_rank] -> [batch, time, heads, v_head_dim]."""
        return _per_head(out, self._expansion()[1].mT)

    def _expansion(self) -> tuple[Tensor, Tensor]:
        """W_uk [heads, qk_nope_head_dim, rank] and W_uv [heads, v_head_dim, rank]."""
        weight = self.expand.weight.unflatten(0, (self.spec.num_attention_heads, -1))
        key, value = weight.split([self.spec.qk_nope_head_dim, self.spec.v_head_dim], dim=1)
        return key, value


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, time, heads, D] times weight [heads, D, E] -> [batch, time, heads, E]."""
    batch, time = x.shape[:2]
    rows = x.flatten(0, 1).transpose(0, 1) @ weight
    return torch.unflatten(rows.transpose(0, 1), 0, (batch, time))


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an MLA spec."""
    assert isinstance(spec, MLA)
    return MLAModule(spec, width)
