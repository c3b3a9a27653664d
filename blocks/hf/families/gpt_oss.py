"""gpt-oss (OpenAI, 2025): sinks, alternating windows, a clamped swish with biases in every expert. transformers `GptOssConfig`.

The checkpoint keeps the experts' matrices transposed, gate and up in alternating columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, read_attention, written
from archcompass.blocks.hf.families.qwen3 import write_windows
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope, rope_of
from archcompass.blocks.hf.weights import Permuted, Then, Transposed, Weight, same
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.blocks.rope import Rope

_ASSUMED_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(fields: Fields) -> ModelSpec:
    """The model of a gpt-oss configuration."""
    depth, window = fields.integer("num_hidden_layers", 36), fields.integer("sliding_window", 128)
    full = read_attention(
        fields,
        kv_heads=8,
        head_dim=64,
        qkv_bias=fields.flag("attention_bias", True),
        rope=_rope(fields),
        sinks=True,
    )
    windowed, moe = full.model_copy(update={"sliding_window": window}), Part("moe", _experts(fields))
    default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)]
    layers = [
        [Part("full", full) if kind == "full_attention" else Part("sliding", windowed), moe]
        for kind in fields.kinds("layer_types", default, "full_attention", "sliding_attention")
    ]
    norm = RMSNorm(eps=fields.number("rms_norm_eps", 1e-5))
    return assemble(fields, layers, residual=Residual(norm=norm), norm=norm)


def _rope(fields: Fields) -> Rope:
    said = read_rope(fields, theta=150000.0)
    silent = "rope_scaling" not in fields.config and "rope_parameters" not in fields.config
    return rope_of(_ASSUMED_ROPE | {"rope_theta": said.theta}) if silent else said


def _experts(fields: Fields) -> MoE:
    fields.expect("hidden_act", "silu")
    return MoE(
        num_experts=fields.integer("num_local_experts", 128),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 4),
        moe_intermediate_size=fields.integer("intermediate_size", 2880),
        swiglu_alpha=fields.number("swiglu_alpha", 1.702),
        swiglu_limit=fields.number("swiglu_limit", 7.0),
        up_offset=1.0,
        scoring_func="topk_softmax",
        router_bias=True,
        expert_bias=True,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """gpt-oss's keys."""
    attention, moe = first(spec, Attention, "gpt_oss"), first(spec, MoE, "gpt_oss")
    windows = write_windows(spec)
    windows.pop("use_sliding_window")
    windows.setdefault("layer_types", ["full_attention"] * spec.num_hidden_layers)
    return (
        written(spec, attention)
        | windows
        | {
            "attention_bias": attention.qkv_bias,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "intermediate_size": moe.moe_intermediate_size,
            "swiglu_alpha": moe.swiglu_alpha,
            "swiglu_limit": moe.swiglu_limit,
            "router_aux_loss_coef": moe.router_aux_loss_coef,
        }
    )


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """gpt-oss's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        if isinstance(place.block, Attention):
            yield same(f"{ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
        elif isinstance(place.block, MoE):
            yield same(f"{ours}.before.weight", f"{theirs}.post_attention_layernorm.weight")
            yield from _expert_weights(f"{ours}.block", f"{theirs}.mlp", place.block)


def _expert_weights(ours: str, theirs: str, block: MoE) -> Iterator[Weight]:
    size = block.moe_intermediate_size
    gates_first = Permuted((*range(0, 2 * size, 2), *range(1, 2 * size, 2)), dim=1)
    yield Weight(f"{ours}.gate_up", (f"{theirs}.experts.gate_up_proj",), Then(Transposed(), gates_first))
    yield Weight(f"{ours}.gate_up_bias", (f"{theirs}.experts.gate_up_proj_bias",), gates_first)
    yield Weight(f"{ours}.down", (f"{theirs}.experts.down_proj",), Transposed())
    yield same(f"{ours}.down_bias", f"{theirs}.experts.down_proj_bias")
    yield from parts.linear(f"{ours}.router", f"{theirs}.router", bias=True)


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"},
    no_effect=("initial_context_length",),
)
