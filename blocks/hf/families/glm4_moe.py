"""GLM-4.5 (arXiv 2508.06471): half-turned heads, DeepSeek's router, the first layers dense. transformers `Glm4MoeConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import (
    assemble,
    hf_activation,
    read_attention,
    read_mlp,
    write_mlp,
    written,
)
from archcompass.blocks.hf.families.nemotron_h import read_router, write_router
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a GLM-4.5 configuration."""
    attention = read_attention(
        fields,
        kv_heads=8,
        qkv_bias=fields.flag("attention_bias", False),
        output_bias=False,
        qk_norm="head" if fields.flag("use_qk_norm", False) else "none",
        qk_norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope=read_rope(fields, factor=0.5),
    )
    return assemble(fields, layers_with_experts(fields, Part("attention", attention), read_experts(fields)), eps=1e-5)


def layers_with_experts(fields: Fields, mixer: Part, moe: MoE, dense: int = 1) -> list[list[Part]]:
    """The first `first_k_dense_replace` layers dense, experts above."""
    mlp, lowest = read_mlp(fields), fields.integer("first_k_dense_replace", dense)
    return [
        [mixer, Part("mlp", mlp) if layer < lowest else Part("moe", moe)]
        for layer in range(fields.integer("num_hidden_layers"))
    ]


def read_experts(
    fields: Fields, scaling: float = 1.0, experts: int = 128, chosen: int = 8, groups: int = 1, kept: int = 1
) -> MoE:
    """DeepSeek-V3's experts; the shared ones are one MLP of their summed width."""
    size = fields.integer("moe_intermediate_size")
    return MoE(
        num_experts=fields.integer("n_routed_experts", experts),
        num_experts_per_tok=fields.integer("num_experts_per_tok", chosen),
        moe_intermediate_size=size,
        shared_expert_intermediate_size=size * fields.integer("n_shared_experts", 1),
        hidden_act=fields.choice("hidden_act", HF_NAMES, "silu"),
        **read_router(fields, scaling, groups, kept),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """GLM-4.5's keys."""
    attention = first(spec, Attention, "glm4_moe")
    return (
        written(spec, attention)
        | {"attention_bias": attention.qkv_bias, "use_qk_norm": attention.qk_norm == "head"}
        | write_experts(spec, first(spec, MoE, "glm4_moe"))
    )


def write_experts(spec: ModelSpec, moe: MoE) -> dict[str, Any]:
    """Keys of DeepSeek-V3's experts and of the dense layers below them."""
    dense = blocks_of(spec, GatedMLP)
    return (
        write_router(moe)
        | {
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_expert_intermediate_size // moe.moe_intermediate_size,
            "hidden_act": hf_activation(moe.hidden_act),
            "first_k_dense_replace": sum(isinstance(place.block, GatedMLP) for place in places(spec)),
            "num_nextn_predict_layers": 0,
        }
        | (write_mlp(dense[0]) if dense else {"intermediate_size": moe.moe_intermediate_size})
    )


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """GLM-4.5's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        if isinstance(place.block, Attention):
            yield same(f"{ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
            continue
        yield same(f"{ours}.before.weight", f"{theirs}.post_attention_layernorm.weight")
        if isinstance(place.block, MoE):
            yield from parts.experts(f"{ours}.block", f"{theirs}.mlp", place.block, shared="shared_experts")
        elif isinstance(place.block, GatedMLP):
            yield from parts.mlp(f"{ours}.block", f"{theirs}.mlp", place.block)


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
    no_effect=("num_nextn_predict_layers",),
)
