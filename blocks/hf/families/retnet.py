"""RetNet (arXiv 2307.08621), tensors named as in the authors' torchscale; transformers has no class for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, hf_activation
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.retention.spec import Retention


def read(fields: Fields) -> ModelSpec:
    """The model of a RetNet configuration."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.expect("glu", True)
    fields.expect("normalize_before", True)
    value = fields.integer("value_dim")
    for key, size in (("hidden_size", width), ("value_dim", value)):
        if size % heads:
            fields.refuse(key, size, f"a multiple of num_attention_heads ({heads})")
    retention = Retention(
        num_attention_heads=heads,
        key_head_dim=width // heads,
        value_head_dim=value // heads,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
    )
    mlp = GatedMLP(
        intermediate_size=fields.integer("intermediate_size"), hidden_act=fields.choice("hidden_act", HF_NAMES, "swish")
    )
    layers = [[Part("retention", retention), Part("mlp", mlp)]] * fields.integer("num_hidden_layers")
    scaled = "sqrt_width" if not fields.flag("no_scale_embedding", True) else 1.0
    return assemble(fields, layers, embedding_multiplier=scaled)


def write(spec: ModelSpec) -> dict[str, Any]:
    """RetNet's keys."""
    retention, mlp = first(spec, Retention, "retnet"), first(spec, GatedMLP, "retnet")
    return written_sizes(spec) | {
        "num_attention_heads": retention.num_attention_heads,
        "value_dim": retention.value_width,
        "intermediate_size": mlp.intermediate_size,
        "hidden_act": hf_activation(mlp.hidden_act),
        "rms_norm_eps": norm_eps(spec),
        "glu": True,
        "normalize_before": True,
        "no_scale_embedding": spec.embedding_multiplier != "sqrt_width",
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """RetNet's tensors; `fc1` passes the nonlinearity, and `gate` multiplies it."""
    yield from parts.ends(spec, "embed_tokens.weight", "layer_norm.weight", "output_projection.weight")
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"layers.{place.layer}"
        norm = "final_layer_norm" if place.part else "retention_layer_norm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        if isinstance(place.block, Retention):
            names = tuple(f"{theirs}.retention.{name}_proj" for name in "qkvg")
            block = place.block
            rows = (block.key_width, block.key_width, block.value_width, block.value_width)
            yield from parts.joined(f"{ours}.input", names, rows)
            yield from parts.linear(f"{ours}.output", f"{theirs}.retention.out_proj")
        elif isinstance(place.block, GatedMLP):
            yield from parts.mlp(ours, f"{theirs}.ffn", place.block, ("fc1", "gate", "fc2"))


FAMILY = Family(
    model_type="retnet",
    architecture="RetNetForCausalLM",
    read=read,
    write=write,
    weights=weights,
    unused=(r"retnet_rel_pos\.",),
)
