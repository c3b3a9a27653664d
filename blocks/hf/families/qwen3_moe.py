"""Qwen3 with experts (arXiv 2505.09388), such as Qwen3-30B-A3B. transformers `Qwen3MoeConfig`."""

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
from archcompass.blocks.hf.families.qwen3 import read_window
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a Qwen3-MoE configuration; the window, where there is one, covers every layer."""
    attention = read_attention(
        fields,
        kv_heads=4,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="head",
        qk_norm_eps=fields.number("rms_norm_eps", 1e-6),
        sliding_window=read_window(fields),
    )
    moe, mlp, dense = read_experts(fields), read_mlp(fields), dense_layers(fields)
    layers = [
        [Part("attention", attention), Part("mlp", mlp) if layer in dense else Part("moe", moe)]
        for layer in range(fields.integer("num_hidden_layers"))
    ]
    return assemble(fields, layers)


def dense_layers(fields: Fields) -> set[int]:
    """Layers without experts: those named, and all but every `decoder_sparse_step`-th."""
    depth, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    named = set(fields.sequence("mlp_only_layers", []))
    return named | {layer for layer in range(depth) if step < 1 or (layer + 1) % step}


def read_experts(fields: Fields, normalised: bool = False, **options: Any) -> MoE:
    """Qwen's experts: softmax over all, the best k, renormalised when `norm_topk_prob` says so."""
    return MoE(
        num_experts=fields.integer("num_experts", 128),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 8),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 768),
        hidden_act=fields.choice("hidden_act", HF_NAMES, "silu"),
        norm_topk_prob=fields.flag("norm_topk_prob", normalised),
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
        **options,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Qwen3-MoE's keys."""
    attention = first(spec, Attention, "qwen3_moe")
    window = {"use_sliding_window": True, "sliding_window": attention.sliding_window}
    return (
        written(spec, attention)
        | {"attention_bias": attention.qkv_bias}
        | (window if attention.sliding_window else {"use_sliding_window": False})
        | write_experts(spec, first(spec, MoE, "qwen3_moe"))
    )


def write_experts(spec: ModelSpec, moe: MoE) -> dict[str, Any]:
    """Keys of Qwen's experts, and of the dense layers between them."""
    dense = blocks_of(spec, GatedMLP)
    without = [place.layer for place in places(spec) if isinstance(place.block, GatedMLP)]
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "hidden_act": hf_activation(moe.hidden_act),
        "norm_topk_prob": moe.norm_topk_prob,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": without,
        **(write_mlp(dense[0]) if dense else {"intermediate_size": moe.moe_intermediate_size}),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Qwen3-MoE's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        if isinstance(place.block, Attention):
            yield same(f"{ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
            continue
        yield same(f"{ours}.before.weight", f"{theirs}.post_attention_layernorm.weight")
        if isinstance(place.block, MoE):
            yield from parts.experts(f"{ours}.block", f"{theirs}.mlp", place.block)
        elif isinstance(place.block, GatedMLP):
            yield from parts.mlp(f"{ours}.block", f"{theirs}.mlp", place.block)


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_local_experts": "num_experts"},
)
