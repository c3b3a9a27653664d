"""RWKV-7 (arXiv 2503.14456), tensors named as in the authors' code; transformers has no class for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.rwkv import assemble, layer_norms, mixes
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Reshaped, Transposed, Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.rwkv7.spec import RWKV7ChannelMix, RWKV7TimeMix

_RANKS = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
_LOW_RANKS = (("decay", "w"), ("rate", "a"), ("residual", "v"))


def read(fields: Fields) -> ModelSpec:
    """The model of an RWKV-7 configuration."""
    width = fields.integer("hidden_size")
    fields.expect("norm_bias", True)
    fields.expect("norm_first", True)
    fields.expect("hidden_act", "sqrelu", "relu2")
    ratio = fields.number("hidden_ratio", 4.0)
    ranks = {key: fields.integer(key, default) for key, default in zip(_RANKS, (64, 64, 32, 128), strict=True)}
    lowest, upper = (
        RWKV7TimeMix(
            head_dim=fields.integer("head_dim", 64), norm_eps=fields.number("ln_x_eps", 64e-5), first=is_first, **ranks
        )
        for is_first in (True, False)
    )
    channel = Part(
        "channel_mix", RWKV7ChannelMix(intermediate_size=fields.integer("intermediate_size", int(ratio * width)))
    )
    depth = fields.integer("num_hidden_layers")
    layers = [[Part("first_time_mix", lowest), channel], *[[Part("time_mix", upper), channel]] * (depth - 1)]
    return assemble(fields, layers, "norm_eps")


def write(spec: ModelSpec) -> dict[str, Any]:
    """RWKV-7's keys."""
    time_mix, channel_mix = first(spec, RWKV7TimeMix, "rwkv7"), first(spec, RWKV7ChannelMix, "rwkv7")
    return written_sizes(spec) | {
        "head_dim": time_mix.head_dim,
        **{key: getattr(time_mix, key) for key in _RANKS},
        "ln_x_eps": time_mix.norm_eps,
        "intermediate_size": channel_mix.intermediate_size,
        "norm_eps": norm_eps(spec),
        "hidden_act": "sqrelu",
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """RWKV-7's tensors."""
    width = spec.hidden_size
    yield from layer_norms(spec, "blocks", "emb.weight", "ln0", "ln_out")
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"blocks.{place.layer}"
        if isinstance(place.block, RWKV7TimeMix):
            yield from _time_mix(ours, f"{theirs}.att", width, place.block.first)
        else:
            yield Weight(f"{ours}.mix", (f"{theirs}.ffn.x_k",), Reshaped((width,), (1, 1, width)))
            yield from parts.linear(f"{ours}.key", f"{theirs}.ffn.key")
            yield from parts.linear(f"{ours}.value", f"{theirs}.ffn.value")


def _time_mix(ours: str, theirs: str, width: int, is_first: bool) -> Iterator[Weight]:
    flat = Reshaped((width,), (1, 1, width))
    yield mixes(f"{ours}.mix", theirs, ("r", "k", "v", "w", "a", "g"), width, "x_")
    for name, letter in _LOW_RANKS[:2] if is_first else _LOW_RANKS:
        yield Weight(f"{ours}.{name}.base", (f"{theirs}.{letter}0",), flat)
        yield from _low_rank(f"{ours}.{name}", f"{theirs}.{letter}")
    yield from _low_rank(f"{ours}.gate", f"{theirs}.g")
    yield Weight(f"{ours}.removal", (f"{theirs}.k_k",), flat)
    yield Weight(f"{ours}.replacement", (f"{theirs}.k_a",), flat)
    yield same(f"{ours}.bonus", f"{theirs}.r_k")
    for name in ("receptance", "key", "value", "output"):
        yield from parts.linear(f"{ours}.{name}", f"{theirs}.{name}")
    yield same(f"{ours}.norm_weight", f"{theirs}.ln_x.weight")
    yield same(f"{ours}.norm_bias", f"{theirs}.ln_x.bias")


def _low_rank(ours: str, theirs: str) -> Iterator[Weight]:
    yield Weight(f"{ours}.down", (f"{theirs}1",), Transposed())
    yield Weight(f"{ours}.up", (f"{theirs}2",), Transposed())


FAMILY = Family(
    model_type="rwkv7",
    architecture="RWKV7ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    no_effect=("fuse_norm", "fuse_cross_entropy", "attn_mode"),
    unused=(r"blocks\.0\.att\.v[012]$",),
)
