"""Mixtral (arXiv 2401.04088): Mistral whose MLP is a mixture of experts. transformers `MixtralConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, hf_activation, read_attention, written
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a Mixtral configuration."""
    attention = read_attention(fields, kv_heads=8, theta=1e6, sliding_window=fields.integer("sliding_window", None))
    layers = [[Part("attention", attention), Part("moe", read_experts(fields))]] * fields.integer("num_hidden_layers")
    return assemble(fields, layers, eps=1e-5)


def read_experts(fields: Fields, experts: int = 8, chosen: int = 2, **options: Any) -> MoE:
    """Mixtral's experts: softmax over all, the best k, weights renormalised."""
    return MoE(
        num_experts=fields.integer("num_local_experts", experts),
        num_experts_per_tok=fields.integer("num_experts_per_tok", chosen),
        moe_intermediate_size=fields.integer("intermediate_size"),
        hidden_act=fields.choice("hidden_act", HF_NAMES, "silu"),
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
        **options,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Mixtral's keys."""
    attention, moe = first(spec, Attention, "mixtral"), first(spec, MoE, "mixtral")
    return written(spec, attention) | write_experts(moe) | {"sliding_window": attention.sliding_window}


def write_experts(moe: MoE) -> dict[str, Any]:
    """Keys of Mixtral's experts."""
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "intermediate_size": moe.moe_intermediate_size,
        "hidden_act": hf_activation(moe.hidden_act),
        "router_aux_loss_coef": moe.router_aux_loss_coef,
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Mixtral's tensors; w1 is the gate, w3 up, w2 down."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        if isinstance(place.block, Attention):
            yield same(f"{ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
        elif isinstance(place.block, MoE):
            yield same(f"{ours}.before.weight", f"{theirs}.post_attention_layernorm.weight")
            yield from parts.experts(f"{ours}.block", f"{theirs}.block_sparse_moe", place.block, ("w1", "w3", "w2"))


FAMILY = Family(model_type="mixtral", architecture="MixtralForCausalLM", read=read, write=write, weights=weights)
