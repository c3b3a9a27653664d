"""Granite 4: Mamba-2 and attention, experts beside a shared MLP, and a multiplier at every seam.

transformers `GraniteMoeHybridConfig`. Without experts the shared MLP is the whole channel mixer. The router takes the
softmax over the chosen experts; the logits are divided by `logits_scaling`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import Block
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.bamba import read_mamba, write_mamba
from archcompass.blocks.hf.families.llama import assemble, hf_activation, read_attention, written
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL, write_expansion
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, norm_eps, places, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.norm.spec import RMSNorm


def read(fields: Fields) -> ModelSpec:
    """The model of a Granite 4 configuration."""
    depth = fields.integer("num_hidden_layers")
    attention, mamba = _attention(fields), read_mamba(fields)
    channel = _channel(fields)
    name = "moe" if isinstance(channel, MoE) else "mlp"
    layers = [
        [
            Part("attention", attention) if kind == "full_attention" else Part("mamba", mamba),
            Part(name, channel),
        ]
        for kind in fields.kinds("layer_types", ["linear_attention"] * depth, "linear_attention", "full_attention")
    ]
    eps = fields.number("rms_norm_eps", 1e-6)
    return assemble(
        fields,
        layers,
        residual=Residual(norm=RMSNorm(eps=eps), multiplier=fields.number("residual_multiplier", 1.0)),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        logit_multiplier=1 / fields.number("logits_scaling", 1.0),
    )


def _attention(fields: Fields) -> Attention:
    fields.expect("position_embedding_type", "rope", "nope")
    rope = read_rope(fields)
    return read_attention(
        fields,
        qkv_bias=fields.flag("attention_bias", False),
        scale=fields.number("attention_multiplier", 1.0),
        rope=rope if fields.config.get("position_embedding_type") == "rope" else None,
    )


def _channel(fields: Fields) -> Block:
    fields.expect("normalization_function", "rmsnorm")
    act = fields.choice("hidden_act", HF_NAMES, "silu")
    experts, shared = fields.integer("num_local_experts", 8), fields.integer("shared_intermediate_size", 1024)
    chosen, size = fields.integer("num_experts_per_tok", 2), fields.integer("intermediate_size")
    coefficient = fields.number("router_aux_loss_coef", 0.001)
    if not experts:
        return GatedMLP(intermediate_size=shared, hidden_act=act)
    return MoE(
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=shared,
        hidden_act=act,
        scoring_func="topk_softmax",
        router_aux_loss_coef=coefficient,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Granite 4's keys."""
    attention, mamba = blocks_of(spec, Attention), blocks_of(spec, Mamba2)
    written_keys = written(spec, attention[0]) if attention else written_sizes(spec) | {"rms_norm_eps": norm_eps(spec)}
    if mamba:
        written_keys |= write_mamba(mamba[0])
        written_keys["mamba_expand"] = write_expansion(mamba[0].inner_width, spec.hidden_size)
    mixers = [place.block for place in places(spec) if isinstance(place.block, Attention | Mamba2)]
    if attention:
        block = attention[0]
        written_keys |= {
            "attention_bias": block.qkv_bias,
            "attention_multiplier": block.head_dim**-0.5 if block.scale is None else block.scale,
            "position_embedding_type": "nope" if block.rope is None else "rope",
        }
    return (
        written_keys
        | _write_channel(spec)
        | {
            "layer_types": [
                "full_attention" if isinstance(mixer, Attention) else "linear_attention" for mixer in mixers
            ],
            "embedding_multiplier": spec.embedding_multiplier,
            "residual_multiplier": spec.residual.multiplier,
            "logits_scaling": reciprocal(spec.logit_multiplier),
        }
    )


def reciprocal(multiplier: float) -> float:
    """The number whose reciprocal is `multiplier`, whole where one is."""
    return round(1 / multiplier) if 1 / round(1 / multiplier or 1) == multiplier else 1 / multiplier


def _write_channel(spec: ModelSpec) -> dict[str, Any]:
    for moe in blocks_of(spec, MoE):
        return {
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "intermediate_size": moe.moe_intermediate_size,
            "shared_intermediate_size": moe.shared_expert_intermediate_size,
            "hidden_act": hf_activation(moe.hidden_act),
            "router_aux_loss_coef": moe.router_aux_loss_coef,
        }
    mlp = first(spec, GatedMLP, "granitemoehybrid")
    return {
        "num_local_experts": 0,
        "intermediate_size": mlp.intermediate_size,
        "shared_intermediate_size": mlp.intermediate_size,
        "hidden_act": hf_activation(mlp.hidden_act),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Granite 4's tensors; the experts are stacked in the checkpoint as well."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "post_attention_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case Mamba2():
                yield from parts.mamba2(ours, f"{theirs}.mamba", place.block)
            case Attention():
                yield from parts.attention(ours, f"{theirs}.self_attn", place.block)
            case GatedMLP():
                yield from _shared(ours, theirs)
            case MoE():
                yield same(f"{ours}.gate_up", f"{theirs}.block_sparse_moe.input_linear.weight")
                yield same(f"{ours}.down", f"{theirs}.block_sparse_moe.output_linear.weight")
                yield same(f"{ours}.router.weight", f"{theirs}.block_sparse_moe.router.layer.weight")
                yield from _shared(f"{ours}.shared", theirs)


def _shared(ours: str, theirs: str) -> Iterator[Weight]:
    yield same(f"{ours}.inward.weight", f"{theirs}.shared_mlp.input_linear.weight")
    yield same(f"{ours}.down.weight", f"{theirs}.shared_mlp.output_linear.weight")


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"layers_block_type": "layer_types"},
    no_effect=(*NUMERICS_NEUTRAL, "init_method"),
)
