"""Mistral 7B (arXiv 2310.06825): Llama with a sliding window. transformers `MistralConfig`."""

from __future__ import annotations

from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf.families.llama import (
    assemble,
    read_attention,
    read_mlp,
    weights,
    write_mlp,
    written,
)
from archcompass.blocks.hf.family import Family, Part, first
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.model.spec import ModelSpec


def read(fields: Fields) -> ModelSpec:
    """The model of a Mistral configuration; a `sliding_window` of null sees everything."""
    window = fields.integer("sliding_window", None if "sliding_window" in fields.config else 4096)
    attention = read_attention(fields, kv_heads=8, sliding_window=window)
    return assemble(
        fields, [[Part("attention", attention), Part("mlp", read_mlp(fields))]] * fields.integer("num_hidden_layers")
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Mistral's keys."""
    attention, mlp = first(spec, Attention, "mistral"), first(spec, GatedMLP, "mistral")
    return written(spec, attention) | write_mlp(mlp) | {"sliding_window": attention.sliding_window}


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=read, write=write, weights=weights)
