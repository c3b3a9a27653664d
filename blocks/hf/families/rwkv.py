"""RWKV-4 (arXiv 2305.13048). transformers `RwkvConfig`; its `rescale_every` keeps float16 in range and changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.hf import parts
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, sizes, stack, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Reshaped, Stacked, Weight, same
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import LayerNorm
from archcompass.blocks.rwkv4.spec import RWKV4ChannelMix, RWKV4TimeMix

EMBEDDING_EPS = 1e-5


def read(fields: Fields) -> ModelSpec:
    """The model of an RWKV-4 configuration."""
    width = fields.integer("hidden_size")
    attention = fields.integer("attention_hidden_size", width)
    time_mix = RWKV4TimeMix(attention_hidden_size=None if attention == width else attention)
    channel_mix = RWKV4ChannelMix(intermediate_size=fields.integer("intermediate_size", 4 * width))
    return assemble(fields, [[Part("time_mix", time_mix), Part("channel_mix", channel_mix)]])


def assemble(fields: Fields, layers: list[list[Part]], eps_key: str = "layer_norm_epsilon") -> ModelSpec:
    """A model with LayerNorms, one of them right after the embedding; `layers` is repeated to the depth when it is one."""
    depth = fields.integer("num_hidden_layers")
    eps = fields.number(eps_key, EMBEDDING_EPS)
    if eps != EMBEDDING_EPS:
        fields.refuse(eps_key, eps, f"{EMBEDDING_EPS}, as the norm after the embedding has it")
    norm = LayerNorm(eps=eps)
    whole = layers * depth if len(layers) == 1 else layers
    ends = {"embedding_norm": True, "residual": Residual(norm=norm), "norm": norm}
    return ModelSpec(**(sizes(fields) | ends | stack(whole)))


def write(spec: ModelSpec) -> dict[str, Any]:
    """RWKV-4's keys."""
    time_mix, channel_mix = first(spec, RWKV4TimeMix, "rwkv"), first(spec, RWKV4ChannelMix, "rwkv")
    written = written_sizes(spec)
    written["context_length"] = written.pop("max_position_embeddings", 1024)
    return written | {
        "attention_hidden_size": time_mix.channels(spec.hidden_size),
        "intermediate_size": channel_mix.intermediate_size,
        "layer_norm_epsilon": norm_eps(spec),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """RWKV-4's tensors."""
    yield from layer_norms(spec, "rwkv.blocks", "rwkv.embeddings.weight", "pre_ln", "rwkv.ln_out")
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"rwkv.blocks.{place.layer}"
        if isinstance(place.block, RWKV4TimeMix):
            theirs = f"{theirs}.attention"
            yield mixes(f"{ours}.mix", theirs, ("key", "value", "receptance"), spec.hidden_size)
            yield same(f"{ours}.decay", f"{theirs}.time_decay")
            yield same(f"{ours}.bonus", f"{theirs}.time_first")
            names = ["key", "value", "receptance", "output"]
        else:
            theirs = f"{theirs}.feed_forward"
            yield mixes(f"{ours}.mix", theirs, ("key", "receptance"), spec.hidden_size)
            names = ["key", "value", "receptance"]
        for name in names:
            yield from parts.linear(f"{ours}.{name}", f"{theirs}.{name}")


def mixes(ours: str, theirs: str, names: tuple[str, ...], width: int, prefix: str = "time_mix_") -> Weight:
    """Shares of the token shift, kept one by one as [1, 1, width], as rows of one tensor."""
    rows = tuple(f"{theirs}.{prefix}{name}" for name in names)
    return Weight(ours, rows, Stacked(len(rows), Reshaped((width,), (1, 1, width))))


def layer_norms(spec: ModelSpec, blocks: str, table: str, first_norm: str, last_norm: str) -> Iterator[Weight]:
    """The table, the head, and the LayerNorms after the embedding, before every sublayer, and at the end."""
    yield same("embedding.weight", table)
    pairs = [("embedding.norm", f"{blocks}.0.{first_norm}"), ("norm", last_norm)]
    pairs += [(f"{place.ours}.before", f"{blocks}.{place.layer}.ln{place.part + 1}") for place in places(spec)]
    for ours, theirs in pairs:
        yield from parts.linear(ours, theirs, bias=True)
    if not spec.tie_word_embeddings:
        yield same("head.weight", "head.weight")


FAMILY = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"context_length": "max_position_embeddings"},
    no_effect=("rescale_every",),
)
