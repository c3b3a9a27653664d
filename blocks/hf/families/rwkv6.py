"""RWKV-6 (arXiv 2404.05892), tensors named as in the authors' code; transformers has no class for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.rwkv import assemble, layer_norms, mixes
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Reshaped, Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.rwkv6.spec import RWKV6ChannelMix, RWKV6TimeMix


def read(fields: Fields) -> ModelSpec:
    """The model of an RWKV-6 configuration; no intermediate size means 3.5 times the width, in steps of 32."""
    width = fields.integer("hidden_size")
    fields.expect("attention_hidden_size", width)
    divisor = fields.number("head_size_divisor", 8)
    time_mix = RWKV6TimeMix(
        head_dim=fields.integer("head_size", 64),
        time_mix_extra_dim=fields.integer("time_mix_extra_dim", 32),
        time_decay_extra_dim=fields.integer("time_decay_extra_dim", 64),
        norm_eps=fields.number("ln_x_eps", 1e-5 * divisor**2),
    )
    channel_mix = RWKV6ChannelMix(intermediate_size=fields.integer("intermediate_size", int(3.5 * width) // 32 * 32))
    return assemble(fields, [[Part("time_mix", time_mix), Part("channel_mix", channel_mix)]])


def write(spec: ModelSpec) -> dict[str, Any]:
    """RWKV-6's keys."""
    time_mix, channel_mix = first(spec, RWKV6TimeMix, "rwkv6"), first(spec, RWKV6ChannelMix, "rwkv6")
    return written_sizes(spec) | {
        "head_size": time_mix.head_dim,
        "time_mix_extra_dim": time_mix.time_mix_extra_dim,
        "time_decay_extra_dim": time_mix.time_decay_extra_dim,
        "ln_x_eps": time_mix.norm_eps,
        "intermediate_size": channel_mix.intermediate_size,
        "layer_norm_epsilon": norm_eps(spec),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """RWKV-6's tensors."""
    width = spec.hidden_size
    yield from layer_norms(spec, "blocks", "emb.weight", "ln0", "ln_out")
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"blocks.{place.layer}"
        if isinstance(place.block, RWKV6TimeMix):
            yield from _time_mix(ours, f"{theirs}.att", width)
        else:
            yield mixes(f"{ours}.mix", f"{theirs}.ffn", ("k", "r"), width, "time_maa_")
            for name in ("key", "value", "receptance"):
                yield from parts.linear(f"{ours}.{name}", f"{theirs}.ffn.{name}")


def _time_mix(ours: str, theirs: str, width: int) -> Iterator[Weight]:
    flat = Reshaped((width,), (1, 1, width))
    yield Weight(f"{ours}.mix_input", (f"{theirs}.time_maa_x",), flat)
    yield mixes(f"{ours}.mix", theirs, ("w", "k", "v", "r", "g"), width, "time_maa_")
    yield same(f"{ours}.mix_down", f"{theirs}.time_maa_w1")
    yield same(f"{ours}.mix_up", f"{theirs}.time_maa_w2")
    yield Weight(f"{ours}.decay", (f"{theirs}.time_decay",), flat)
    yield same(f"{ours}.decay_down", f"{theirs}.time_decay_w1")
    yield same(f"{ours}.decay_up", f"{theirs}.time_decay_w2")
    yield same(f"{ours}.bonus", f"{theirs}.time_faaaa")
    for name in ("receptance", "key", "value", "gate", "output"):
        yield from parts.linear(f"{ours}.{name}", f"{theirs}.{name}")
    yield same(f"{ours}.norm_weight", f"{theirs}.ln_x.weight")
    yield same(f"{ours}.norm_bias", f"{theirs}.ln_x.bias")


FAMILY = Family(
    model_type="rwkv6",
    architecture="Rwkv6ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"context_length": "max_position_embeddings"},
    no_effect=("rescale_every", "model_version"),
)
