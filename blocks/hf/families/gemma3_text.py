"""Gemma 3 (arXiv 2503.19786): norms on both sides, five windowed layers to one full, two ropes. `Gemma3TextConfig`.

Norm weights are stored as the distance from one and multiplied in float32; embeddings are scaled by √hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, hf_activation, read_attention, written
from archcompass.blocks.hf.families.qwen3 import write_windows
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope, rope_of, write_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm

_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def read(fields: Fields) -> ModelSpec:
    """The model of a Gemma 3 text configuration."""
    depth, every = fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern", 6)
    fields.expect("use_bidirectional_attention", False)
    full, sliding = _attentions(fields)
    mlp = GatedMLP(
        intermediate_size=fields.integer("intermediate_size"),
        hidden_act=fields.choice("hidden_activation", HF_NAMES, "gelu_pytorch_tanh"),
    )
    default = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(depth)]
    layers = [
        [Part("full", full) if kind == "full_attention" else Part("sliding", sliding), Part("mlp", mlp)]
        for kind in fields.kinds("layer_types", default, "full_attention", "sliding_attention")
    ]
    norm = RMSNorm(eps=fields.number("rms_norm_eps", 1e-6), unit_offset=True)
    more = {"tie_word_embeddings": fields.flag("tie_word_embeddings", True), "embedding_multiplier": "sqrt_width"}
    cap = fields.number("final_logit_softcapping", None)
    return assemble(
        fields, layers, residual=Residual(position="sandwich", norm=norm), norm=norm, logit_soft_cap=cap, **more
    )


def _attentions(fields: Fields) -> tuple[Attention, Attention]:
    """Full attention, and attention within the window, each with its own rope."""
    full = read_attention(
        fields,
        kv_heads=4,
        head_dim=256,
        qkv_bias=fields.flag("attention_bias", False),
        rope=read_rope(fields, theta=1e6, layer_type="full_attention"),
        qk_norm="head",
        qk_norm_eps=fields.number("rms_norm_eps", 1e-6),
        qk_norm_unit_offset=True,
        scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_soft_cap=fields.number("attn_logit_softcapping", None),
    )
    local = {"rope_theta": fields.number("rope_local_base_freq", 10000.0)}
    local |= fields.mapping("rope_parameters", {}).get("sliding_attention") or {}
    window = fields.integer("sliding_window", 4096)
    return full, full.model_copy(update={"rope": rope_of(local), "sliding_window": window})


def write(spec: ModelSpec) -> dict[str, Any]:
    """Gemma 3's keys."""
    attentions, mlp = blocks_of(spec, Attention), first(spec, GatedMLP, "gemma3_text")
    some = first(spec, Attention, "gemma3_text")
    scale = some.head_dim**-0.5 if some.scale is None else some.scale
    windows = write_windows(spec)
    windows.pop("use_sliding_window")
    windows.setdefault("layer_types", ["full_attention"] * spec.num_hidden_layers)
    ropes = {
        "sliding_attention" if block.sliding_window else "full_attention": write_rope(block.rope)
        for block in attentions
        if block.rope is not None
    }
    return (
        written(spec, some)
        | windows
        | {
            "rope_parameters": ropes,
            "attention_bias": some.qkv_bias,
            "intermediate_size": mlp.intermediate_size,
            "hidden_activation": hf_activation(mlp.hidden_act),
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": some.logit_soft_cap,
            "final_logit_softcapping": spec.logit_soft_cap,
        }
    )


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Gemma 3's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        before, after = _NORMS[place.part]
        yield same(f"{ours}.before.weight", f"{theirs}.{before}.weight")
        yield same(f"{ours}.after.weight", f"{theirs}.{after}.weight")
        if isinstance(place.block, Attention):
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
        elif isinstance(place.block, GatedMLP):
            yield from parts.mlp(f"{ours}.block", f"{theirs}.mlp", place.block)


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"_sliding_window_pattern": "sliding_window_pattern", "hidden_act": "hidden_activation"},
    no_effect=("cache_implementation",),
)
