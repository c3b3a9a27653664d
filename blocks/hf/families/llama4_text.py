"""Llama 4 (Meta, 2025): attention in absolute chunks with rope, every fourth layer whole without it, experts on the input.

transformers `Llama4TextConfig`. Queries and keys of the layers with rope are L2-normed once turned, without a weight;
queries of the others grow slowly with the position. The router's sigmoid multiplies what an expert reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, hf_activation, read_attention, written
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Transposed, Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a Llama 4 text configuration."""
    depth = fields.integer("num_hidden_layers", 48)
    every, step = fields.integer("no_rope_layer_interval", 4), fields.integer("interleave_moe_layer_step", 1)
    turned = fields.sequence("no_rope_layers", []) or [int((layer + 1) % every != 0) for layer in range(depth)]
    if len(turned) != depth:
        fields.refuse("no_rope_layers", f"a list of {len(turned)}", f"one of {depth}, an entry for each layer")
    default = ["chunked_attention" if turn else "full_attention" for turn in turned]
    kinds = fields.kinds("layer_types", default, "chunked_attention", "full_attention")
    with_experts = set(fields.sequence("moe_layers", list(range(step - 1, depth, step))))
    mixers = {
        key: Part("local" if key[0] else "global", _attention(fields, *key))
        for key in set(zip(turned, kinds, strict=True))
    }
    channels = _channels(fields)
    layers = [[mixers[turned[layer], kinds[layer]], channels[layer in with_experts]] for layer in range(depth)]
    return assemble(fields, layers, eps=1e-5)


def _attention(fields: Fields, turn: int, kind: str) -> Attention:
    rope = read_rope(fields, theta=500000.0, interleaved=True)
    chunk = fields.integer("attention_chunk_size", 8192)
    normed, tuned = fields.flag("use_qk_norm", True), bool(fields.take("attn_temperature_tuning", True))
    floor, scale = fields.number("floor_scale", 8192), fields.number("attn_scale", 0.1)
    options: dict[str, Any] = {"rope": rope if turn else None, "qkv_bias": fields.flag("attention_bias", False)}
    if kind == "chunked_attention":
        options["attention_chunk_size"] = chunk
    if turn and normed:
        eps = fields.number("rms_norm_eps", 1e-5)
        options |= {"qk_norm": "head", "qk_norm_weight": False, "qk_norm_after_rope": True, "qk_norm_eps": eps}
    if tuned and not turn:
        options |= {"temperature_floor_scale": floor, "temperature_attn_scale": scale}
    return read_attention(fields, kv_heads=8, head_dim=128, **options)


def _channels(fields: Fields) -> dict[bool, Part]:
    """The MLP of a dense layer and the experts of the others."""
    act, size = fields.choice("hidden_act", HF_NAMES, "silu"), fields.integer("intermediate_size", 8192)
    moe = MoE(
        num_experts=fields.integer("num_local_experts", 16),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 1),
        moe_intermediate_size=size,
        shared_expert_intermediate_size=size,
        hidden_act=act,
        scoring_func="sigmoid",
        norm_topk_prob=False,
        scale_input=True,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )
    mlp = GatedMLP(intermediate_size=fields.integer("intermediate_size_mlp", 16384), hidden_act=act)
    return {True: Part("moe", moe), False: Part("mlp", mlp)}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Llama 4's keys."""
    blocks = [place.block for place in places(spec) if isinstance(place.block, Attention)]
    some = first(spec, Attention, "llama4_text")
    tuned = next((block for block in blocks if block.temperature_floor_scale), some)
    turned = next((block for block in blocks if block.rope is not None), some)
    chunks = [block.attention_chunk_size for block in blocks]
    return (
        written(spec, turned)
        | _write_channels(spec)
        | {
            "no_rope_layers": [int(block.rope is not None) for block in blocks],
            "layer_types": ["chunked_attention" if chunk else "full_attention" for chunk in chunks],
            "attention_chunk_size": next((chunk for chunk in chunks if chunk), 8192),
            "use_qk_norm": turned.qk_norm == "head",
            "attn_temperature_tuning": tuned.temperature_floor_scale is not None,
            "floor_scale": int(tuned.temperature_floor_scale or 8192),
            "attn_scale": tuned.temperature_attn_scale,
            "attention_bias": some.qkv_bias,
        }
    )


def _write_channels(spec: ModelSpec) -> dict[str, Any]:
    dense, moe = blocks_of(spec, GatedMLP), first(spec, MoE, "llama4_text")
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "intermediate_size": moe.moe_intermediate_size,
        "intermediate_size_mlp": dense[0].intermediate_size if dense else 2 * moe.moe_intermediate_size,
        "hidden_act": hf_activation(moe.hidden_act),
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "moe_layers": [place.layer for place in places(spec) if isinstance(place.block, MoE)],
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Llama 4's tensors; the experts are stacked and transposed."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "post_attention_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case Attention():
                yield from parts.attention(ours, f"{theirs}.self_attn", place.block)
            case GatedMLP():
                yield from parts.mlp(ours, f"{theirs}.feed_forward", place.block)
            case MoE(shared=shared):
                experts = f"{theirs}.feed_forward.experts"
                yield Weight(f"{ours}.gate_up", (f"{experts}.gate_up_proj",), Transposed())
                yield Weight(f"{ours}.down", (f"{experts}.down_proj",), Transposed())
                yield from parts.linear(f"{ours}.router", f"{theirs}.feed_forward.router")
                if shared is not None:
                    yield from parts.mlp(f"{ours}.shared", f"{theirs}.feed_forward.shared_expert", shared)


FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    no_effect=("for_llm_compressor", "cache_implementation"),
)
