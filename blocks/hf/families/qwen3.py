"""Qwen3 (arXiv 2505.09388): Llama with RMSNorm on every query and key head. transformers `Qwen3Config`."""

from __future__ import annotations

from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf.families.llama import assemble, read_attention, read_mlp, weights, write_mlp, written
from archcompass.blocks.hf.family import Family, Part, first
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.model.spec import ModelSpec


def read(fields: Fields) -> ModelSpec:
    """The model of a Qwen3 configuration; with `use_sliding_window` the upper layers have a window."""
    depth, mlp = fields.integer("num_hidden_layers"), read_mlp(fields)
    window = read_window(fields)
    full = read_attention(
        fields,
        head_dim=128,
        kv_heads=32,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="head",
        qk_norm_eps=fields.number("rms_norm_eps", 1e-6),
    )
    windowed = full.model_copy(update={"sliding_window": window})
    lowest = fields.integer("max_window_layers", 28)
    default = ["sliding_attention" if window and layer >= lowest else "full_attention" for layer in range(depth)]
    kinds = fields.kinds("layer_types", default, "full_attention", "sliding_attention")
    chosen = [windowed if kind == "sliding_attention" else full for kind in kinds]
    return assemble(fields, [[Part("attention", attention), Part("mlp", mlp)] for attention in chosen])


def read_window(fields: Fields) -> int | None:
    """The window, which counts only where `use_sliding_window` says so."""
    window: int | None = fields.integer("sliding_window", 4096)
    return window if fields.flag("use_sliding_window", False) else None


def write(spec: ModelSpec) -> dict[str, Any]:
    """Qwen3's keys."""
    attention, mlp = first(spec, Attention, "qwen3"), first(spec, GatedMLP, "qwen3")
    return written(spec, attention) | write_mlp(mlp) | {"attention_bias": attention.qkv_bias} | write_windows(spec)


def write_windows(spec: ModelSpec) -> dict[str, Any]:
    """Which layers have a window, and how long it is."""
    windows = [
        block.sliding_window
        for names in spec.expanded
        for block in (spec.blocks[name] for name in names)
        if isinstance(block, Attention)
    ]
    longest = max((window or 0 for window in windows), default=0)
    if not longest:
        return {"use_sliding_window": False}
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"use_sliding_window": True, "sliding_window": longest, "layer_types": kinds}


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=read, write=write, weights=weights)
