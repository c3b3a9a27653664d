"""A guided mixer at work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archcompass.blocks.attention.module import AttentionModule
from archcompass.blocks.base import Block
from archcompass.blocks.gated_mlp.module import GatedMLPModule
from archcompass.blocks.guided.spec import Guided
from archcompass.blocks.norm.module import RMSNormModule
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.blocks.runtime import BlockModule, BlockState, CompoundState, Context, Linear, part_of
from archcompass.errors import InputError


class Guide(nn.Module):
    """The part that places share: attention and MLP, each behind its norm, without residuals."""

    def __init__(self, spec: Guided, width: int) -> None:
        super().__init__()
        norm = RMSNorm(eps=spec.norm_eps)
        self.attention_norm = RMSNormModule(norm, 2 * width)
        self.attention = AttentionModule(spec.attention, 2 * width, width)
        self.mlp_norm = RMSNormModule(norm, width)
        self.mlp = GatedMLPModule(spec.mlp, width)


class Adapter(nn.Module):
    """x -> x A B, of low rank."""

    def __init__(self, width: int, rank: int, columns: int) -> None:
        super().__init__()
        self.down, self.up = Linear(width, rank), Linear(rank, columns)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


class GuidedModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]; the context must hold the token embeddings.

    State: "attention" is the guide's cache at this place, "mixer" the mixer's own.
    """

    spec: Guided

    def __init__(self, spec: Guided, width: int, layer: int, guide: Guide | None = None) -> None:
        super().__init__(spec, width)
        self.guide = guide or Guide(spec, width)
        rank = spec.adapter_rank or 0
        self.attention_adapters = nn.ModuleList(Adapter(2 * width, rank, columns) for columns in spec.adapted)
        self.mlp_adapter = Adapter(width, rank, spec.mlp.inward) if rank else None
        self.into = Linear(width, width)
        self.norm = RMSNormModule(RMSNorm(eps=spec.norm_eps), width)
        self.mixer = spec.mixer.build(width, layer)

    def twin(self, layer: int) -> GuidedModule:
        return GuidedModule(self.spec, self.width, layer, self.guide)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        if context is None or context.embeddings is None:
            raise InputError("a guided mixer needs the token embeddings in its context")
        told, attention = self._guidance(torch.cat([x, context.embeddings], dim=-1), state, context)
        y, mixer = self.mixer(self.norm.normalise(x + self.into(told)), part_of(state, "mixer"), context)
        kept = attention is not None or mixer is not None
        return y, CompoundState({"attention": attention, "mixer": mixer}) if kept else None

    def _guidance(self, both: Tensor, state: BlockState | None, context: Context) -> tuple[Tensor, BlockState | None]:
        guide = self.guide
        read = guide.attention_norm.normalise(both)
        projected = guide.attention.qkv(read)
        if self.attention_adapters:
            projected = projected + torch.cat([adapter(read) for adapter in self.attention_adapters], dim=-1)
        mixed, cache = guide.attention.mix(projected, part_of(state, "attention"), context)
        mixed = guide.mlp_norm.normalise(mixed)
        hidden = guide.mlp.inward(mixed)
        hidden = hidden if self.mlp_adapter is None else hidden + self.mlp_adapter(mixed)
        return guide.mlp.finish(hidden), cache


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a guided mixer."""
    assert isinstance(spec, Guided)
    return GuidedModule(spec, width, layer)
