"""Olmo hybrid: Gated DeltaNet with negative eigenvalues under pre-norm, attention under post-norm.

transformers `OlmoHybridConfig`. Attention norms queries and keys over all heads together; a `rope_theta` of null is no
position at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_delta_net.spec import GatedDeltaNet
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, read_attention, read_mlp, write_mlp, written
from archcompass.blocks.hf.families.qwen3_next import write_linear
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Reshaped, Rows, Then, Weight, same
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm

_STARTING_VALUES = ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")


def read(fields: Fields) -> ModelSpec:
    """The model of an Olmo hybrid configuration."""
    depth, eps = fields.integer("num_hidden_layers"), fields.number("rms_norm_eps", 1e-6)
    rope = read_rope(fields)
    attention = read_attention(
        fields,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="all",
        qk_norm_eps=eps,
        rope=None if _positions_off(fields) else rope,
    )
    after = Residual(position="post", norm=RMSNorm(eps=eps))
    linear, mlp = _linear(fields), read_mlp(fields)
    default = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(depth)]
    if "full_attention" not in default:
        default[-1] = "full_attention"
    kinds = fields.kinds("layer_types", default, "linear_attention", "full_attention")
    layers = {
        "full_attention": [Part("attention", attention, after), Part("mlp_after", mlp, after)],
        "linear_attention": [Part("linear", linear), Part("mlp", mlp)],
    }
    return assemble(fields, [layers[kind] for kind in kinds])


def _positions_off(fields: Fields) -> bool:
    """Whether `rope_theta` is there and null."""
    nested = fields.config.get("rope_parameters")
    if nested is not None:
        return bool(nested.get("rope_theta", 0) is None)
    return "rope_theta" in fields.config and fields.config["rope_theta"] is None


def _linear(fields: Fields) -> GatedDeltaNet:
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    keys = fields.integer("linear_num_key_heads", heads)
    key_dim = fields.integer("linear_key_head_dim", int(0.75 * width / keys))
    return GatedDeltaNet(
        num_key_heads=keys,
        num_value_heads=fields.integer("linear_num_value_heads", heads),
        key_head_dim=key_dim,
        value_head_dim=fields.integer("linear_value_head_dim", 2 * key_dim),
        conv_kernel=fields.integer("linear_conv_kernel_dim", 4),
        allow_neg_eigval=fields.flag("linear_allow_neg_eigval", True),
        norm_eps=1e-5,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Olmo hybrid's keys."""
    attention, linear = first(spec, Attention, "olmo_hybrid"), first(spec, GatedDeltaNet, "olmo_hybrid")
    mlp = first(spec, GatedMLP, "olmo_hybrid")
    mixers = [place.block for place in places(spec) if place.part == 0]
    said = written(spec, attention) | write_linear(linear) | write_mlp(mlp)
    said.pop("head_dim")
    return said | {
        "attention_bias": attention.qkv_bias,
        "linear_allow_neg_eigval": linear.allow_neg_eigval,
        "layer_types": ["full_attention" if isinstance(mixer, Attention) else "linear_attention" for mixer in mixers],
        **({"rope_theta": None, "rope_parameters": {"rope_theta": None}} if attention.rope is None else {}),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Olmo hybrid's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        after = spec.residual_of(place.name).position == "post"
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        norms = norms if after else ("attention_layer_norm", "feedforward_layer_norm")
        yield same(f"{ours}.{'after' if after else 'before'}.weight", f"{theirs}.{norms[place.part]}.weight")
        if after and place.part == 0:
            # transformers 5 writes this one under the name of the other layers' norm.
            yield same(f"{ours}.after.weight", f"{theirs}.feedforward_layer_norm.weight")
        match place.block:
            case Attention():
                yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
            case GatedDeltaNet():
                yield from _linear_weights(f"{ours}.block", f"{theirs}.linear_attn", place.block)
            case GatedMLP():
                yield from parts.mlp(f"{ours}.block", f"{theirs}.mlp", place.block)


def _linear_weights(ours: str, theirs: str, block: GatedDeltaNet) -> Iterator[Weight]:
    key, value, heads, taps = block.key_width, block.value_width, block.num_value_heads, block.conv_kernel
    names = tuple(f"{theirs}.{name}_proj" for name in "qkvgba")
    yield from parts.joined(f"{ours}.input", names, (key, key, value, value, heads, heads))
    flat = Reshaped((block.conv_channels, taps), (block.conv_channels, 1, taps))
    filters = tuple(f"{theirs}.{name}_conv1d.weight" for name in "qkv")
    yield Weight(f"{ours}.conv_weight", filters, Then(Rows((key, key, value)), flat))
    yield same(f"{ours}.a_log", f"{theirs}.A_log")
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias")
    yield same(f"{ours}.norm_weight", f"{theirs}.o_norm.weight")
    yield from parts.linear(f"{ours}.output", f"{theirs}.o_proj")


FAMILY = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    read=read,
    write=write,
    weights=weights,
    no_effect=_STARTING_VALUES,
)
