"""Mellum 2 (JetBrains, 2026): Qwen3 with experts whose attention layers may each have a window. transformers `MellumConfig`.

Rotary positions are given per kind of layer, and so is whether a layer has experts.
"""

from __future__ import annotations

from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf.families.llama import assemble, read_attention, read_mlp, write_mlp, written
from archcompass.blocks.hf.families.qwen3_moe import read_experts, weights, write_experts
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope, write_rope
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE
from archcompass.errors import ConversionError

FULL, WINDOWED = "full_attention", "sliding_attention"

_THETA = {FULL: 500000.0, WINDOWED: 10000.0}
"""What the class assumes where the file is silent."""


def read(fields: Fields) -> ModelSpec:
    """The model of a Mellum configuration; the predicting layers beside it (`mtp`) are not part of it."""
    depth = fields.integer("num_hidden_layers", 28)
    window = fields.integer("sliding_window", 1024)
    attention = {kind: _attention(fields, kind, window) for kind in (FULL, WINDOWED)}
    channel = {"sparse": Part("moe", read_experts(fields, normalised=True)), "dense": Part("mlp", read_mlp(fields))}
    kinds = fields.kinds("layer_types", [FULL] * depth, FULL, WINDOWED)
    channels = fields.kinds("mlp_layer_types", ["sparse"] * depth, "sparse", "dense")
    return assemble(
        fields, [[Part("attention", attention[kind]), channel[mlp]] for kind, mlp in zip(kinds, channels, strict=True)]
    )


def _attention(fields: Fields, kind: str, window: int | None) -> Attention:
    return read_attention(
        fields,
        kv_heads=4,
        head_dim=128,
        qkv_bias=fields.flag("attention_bias", False),
        rope=read_rope(fields, theta=_THETA[kind], layer_type=kind),
        sliding_window=window if kind == WINDOWED else None,
        qk_norm="head",
        qk_norm_eps=fields.number("rms_norm_eps", 1e-6),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Mellum's keys."""
    found = blocks_of(spec, Attention)
    attention, dense = first(spec, Attention, "mellum"), blocks_of(spec, GatedMLP)
    kinds = {FULL if block.sliding_window is None else WINDOWED: block for block in found}
    if any(block.rope is None for block in found):
        raise ConversionError("rope is None, and every mellum layer turns its heads")
    experts = write_experts(spec, first(spec, MoE, "mellum"))
    for elsewhere in ("decoder_sparse_step", "mlp_only_layers"):
        experts.pop(elsewhere)
    placed = list(places(spec))
    return (
        written(spec, attention)
        | experts
        | (write_mlp(dense[0]) if dense else {})
        | {
            "attention_bias": attention.qkv_bias,
            "rope_parameters": {kind: write_rope(block.rope) for kind, block in kinds.items() if block.rope},
            "layer_types": [
                FULL if place.block.sliding_window is None else WINDOWED
                for place in placed
                if isinstance(place.block, Attention)
            ],
            "mlp_layer_types": [
                "sparse" if isinstance(place.block, MoE) else "dense"
                for place in placed
                if isinstance(place.block, MoE | GatedMLP)
            ],
            **({"sliding_window": kinds[WINDOWED].sliding_window} if WINDOWED in kinds else {}),
        }
    )


FAMILY = Family(
    model_type="mellum",
    architecture="MellumForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_local_experts": "num_experts"},
    no_effect=("num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"),
    unused=(r".*rotary_emb\..*inv_freq$", r"mtp\."),
)
