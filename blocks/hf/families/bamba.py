"""Bamba: Mamba-2 layers with a few of rotary attention between them, SwiGLU in every layer. transformers `BambaConfig`.

Its attention turns half of each head's channels, whatever the file says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, read_attention, read_mlp, write_mlp, written
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL, read_limit, write_expansion, write_limit
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec


def read(fields: Fields) -> ModelSpec:
    """The model of a Bamba configuration."""
    depth = fields.integer("num_hidden_layers")
    rope = read_rope(fields).model_copy(update={"partial_rotary_factor": 0.5})
    attention = read_attention(fields, kv_heads=8, qkv_bias=fields.flag("attention_bias", False), rope=rope)
    fields.expect("attn_rotary_emb", attention.head_dim // 2)
    mamba, mlp = read_mamba(fields, eps=1e-5), read_mlp(fields)
    indices = set(fields.sequence("attn_layer_indices", []))
    default = ["full_attention" if layer in indices else "linear_attention" for layer in range(depth)]
    layers = [
        [Part("attention", attention) if kind == "full_attention" else Part("mamba", mamba), Part("mlp", mlp)]
        for kind in fields.kinds("layers_block_type", default, "linear_attention", "full_attention")
    ]
    return assemble(fields, layers, eps=1e-5)


def read_mamba(fields: Fields, eps: float = 1e-6, **options: Any) -> Mamba2:
    """The Mamba-2 mixer as Bamba, Granite 4 and Falcon-H1 configure it."""
    heads = fields.integer("mamba_n_heads", 128)
    inner = options.pop("inner", int(fields.number("mamba_expand", 2) * fields.integer("hidden_size")))
    head_dim = fields.automatic("mamba_d_head", inner // heads)
    if heads * head_dim != inner:
        fields.refuse("mamba_d_head", head_dim, f"{inner // heads}, so that the heads have {inner} channels together")
    return Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_size=fields.integer("mamba_d_state", 256),
        n_groups=fields.integer("mamba_n_groups", 1),
        conv_kernel=fields.integer("mamba_d_conv", 4),
        time_step_limit=read_limit(fields.sequence("time_step_limit", (0.0, math.inf), 2)),
        use_bias=fields.flag("mamba_proj_bias", False),
        use_conv_bias=fields.flag("mamba_conv_bias", True),
        norm_eps=fields.number("rms_norm_eps", eps),
        **options,
    )


def write_mamba(block: Mamba2) -> dict[str, Any]:
    """The mixer's keys on their way back."""
    return {
        "mamba_n_heads": block.num_heads,
        "mamba_d_head": block.head_dim,
        "mamba_d_state": block.state_size,
        "mamba_n_groups": block.n_groups,
        "mamba_d_conv": block.conv_kernel,
        "time_step_limit": write_limit(block),
        "mamba_proj_bias": block.use_bias,
        "mamba_conv_bias": block.use_conv_bias,
    }


def write(spec: ModelSpec) -> dict[str, Any]:
    """Bamba's keys."""
    attention, mamba = first(spec, Attention, "bamba"), first(spec, Mamba2, "bamba")
    return (
        written(spec, attention)
        | write_mamba(mamba)
        | write_mlp(first(spec, GatedMLP, "bamba"))
        | {
            "mamba_expand": write_expansion(mamba.inner_width, spec.hidden_size),
            "attention_bias": attention.qkv_bias,
            "mlp_bias": first(spec, GatedMLP, "bamba").bias,
            "attn_layer_indices": [place.layer for place in places(spec) if isinstance(place.block, Attention)],
        }
    )


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Bamba's tensors."""
    yield from parts.ends(spec, norm="model.final_layernorm.weight")
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        norm = "pre_ff_layernorm" if isinstance(place.block, GatedMLP) else "input_layernorm"
        yield same(f"{ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case Mamba2():
                yield from parts.mamba2(f"{ours}.block", f"{theirs}.mamba", place.block)
            case Attention():
                yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
            case GatedMLP():
                yield from parts.mlp(f"{ours}.block", f"{theirs}.feed_forward", place.block)


FAMILY = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"layer_types": "layers_block_type"},
    no_effect=(*NUMERICS_NEUTRAL, "z_loss_coefficient"),
)
