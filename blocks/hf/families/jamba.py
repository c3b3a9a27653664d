"""Jamba (arXiv 2403.19887, 2408.12570): Mamba-1 with inner norms, attention without positions in every eighth layer,
experts in every other. transformers `JambaConfig`; the router's weights are not renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, hf_activation, read_attention, read_mlp, written
from archcompass.blocks.hf.families.mamba import WAYS_TO_COMPUTE, read_rank
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL, write_expansion
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba.spec import Mamba
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE
from archcompass.errors import ConversionError


def read(fields: Fields) -> ModelSpec:
    """The model of a Jamba configuration."""
    fields.expect("sliding_window")
    fields.expect("mamba_inner_layernorms", True)
    attention = read_attention(fields, kv_heads=8, rope=None)
    mamba, mlp, moe = _mamba(fields), read_mlp(fields), _experts(fields)
    period, offset = fields.integer("attn_layer_period", 8), fields.integer("attn_layer_offset", 4)
    every, from_ = fields.integer("expert_layer_period", 2), fields.integer("expert_layer_offset", 1)
    layers = [
        [
            Part("attention", attention) if layer % period == offset else Part("mamba", mamba),
            Part("moe", moe) if layer % every == from_ and moe.num_experts > 1 else Part("mlp", mlp),
        ]
        for layer in range(fields.integer("num_hidden_layers"))
    ]
    _expect_the_same_lists(fields, layers)
    return assemble(fields, layers)


def _expect_the_same_lists(fields: Fields, layers: list[list[Part]]) -> None:
    """What some files say layer by layer besides follows from the periods."""
    kinds = ["full_attention" if mixer.name == "attention" else "linear_attention" for mixer, _ in layers]
    for key in ("layers_block_type", "layer_types"):
        if fields.kinds(key, kinds, "linear_attention", "full_attention") != kinds:
            fields.refuse(key, "another list", "what attn_layer_period and attn_layer_offset make")
    experts = [channel.block.num_experts if isinstance(channel.block, MoE) else 1 for _, channel in layers]
    fields.expect("layers_num_experts", experts)


def _mamba(fields: Fields) -> Mamba:
    return Mamba(
        intermediate_size=int(fields.number("mamba_expand", 2) * fields.integer("hidden_size")),
        state_size=fields.integer("mamba_d_state", 16),
        conv_kernel=fields.integer("mamba_d_conv", 4),
        time_step_rank=read_rank(fields, "mamba_dt_rank"),
        use_bias=fields.flag("mamba_proj_bias", False),
        use_conv_bias=fields.flag("mamba_conv_bias", True),
        inner_norms=True,
        inner_norm_eps=fields.number("rms_norm_eps", 1e-6),
    )


def _experts(fields: Fields) -> MoE:
    return MoE(
        num_experts=fields.integer("num_experts", 16),
        num_experts_per_tok=min(fields.integer("num_experts_per_tok", 2), fields.integer("num_experts", 16)),
        moe_intermediate_size=fields.integer("intermediate_size"),
        hidden_act=fields.choice("hidden_act", HF_NAMES, "silu"),
        norm_topk_prob=False,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Jamba's keys."""
    attention, mamba = first(spec, Attention, "jamba"), first(spec, Mamba, "jamba")
    channel = first(spec, MoE, "jamba") if blocks_of(spec, MoE) else first(spec, GatedMLP, "jamba")
    said = written(spec, attention)
    said.pop("rope_parameters", None)
    if said.pop("head_dim") * attention.num_attention_heads != spec.hidden_size:
        raise ConversionError(
            f"blocks.attention.head_dim is {attention.head_dim}; jamba divides hidden_size by the heads"
        )
    inner, width = mamba.intermediate_size, spec.hidden_size
    return (
        said
        | _write_pattern(spec, Attention, "attn")
        | _write_pattern(spec, MoE, "expert")
        | _write_channel(channel)
        | {
            "mamba_expand": write_expansion(inner, width),
            "mamba_d_state": mamba.state_size,
            "mamba_d_conv": mamba.conv_kernel,
            "mamba_dt_rank": mamba.time_step_rank,
            "mamba_proj_bias": mamba.use_bias,
            "mamba_conv_bias": mamba.use_conv_bias,
        }
    )


def _write_channel(channel: MoE | GatedMLP) -> dict[str, Any]:
    act = {"hidden_act": hf_activation(channel.hidden_act)}
    if isinstance(channel, GatedMLP):
        return act | {"intermediate_size": channel.intermediate_size, "num_experts": 1, "num_experts_per_tok": 1}
    return act | {
        "intermediate_size": channel.moe_intermediate_size,
        "num_experts": channel.num_experts,
        "num_experts_per_tok": channel.num_experts_per_tok,
        "router_aux_loss_coef": channel.router_aux_loss_coef,
    }


def _write_pattern(spec: ModelSpec, kind: type[Attention] | type[MoE], name: str) -> dict[str, int]:
    """Period and offset of the layers that hold a block of this kind."""
    layers = [place.layer for place in places(spec) if isinstance(place.block, kind)]
    period = layers[1] - layers[0] if len(layers) > 1 else spec.num_hidden_layers
    offset = layers[0] % period if layers else 0
    return {f"{name}_layer_period": period, f"{name}_layer_offset": offset}


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Jamba's tensors."""
    yield from parts.ends(spec, norm="model.final_layernorm.weight")
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "pre_ff_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case Mamba():
                yield from parts.mamba(ours, f"{theirs}.mamba", place.block)
            case Attention():
                yield from parts.attention(ours, f"{theirs}.self_attn", place.block)
            case GatedMLP():
                yield from parts.mlp(ours, f"{theirs}.feed_forward", place.block)
            case MoE():
                yield from parts.experts(ours, f"{theirs}.feed_forward", place.block, router="router")


FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_local_experts": "num_experts"},
    no_effect=(
        *NUMERICS_NEUTRAL,
        *WAYS_TO_COMPUTE,
        "calc_logits_for_entire_prompt",
    ),
)
