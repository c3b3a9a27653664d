"""Falcon-H1 (arXiv 2507.22448): attention and Mamba-2 side by side in every layer, a multiplier at every seam.

transformers `FalconH1Config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.bamba import read_mamba, write_mamba
from archcompass.blocks.hf.families.llama import assemble, read_attention, read_mlp, write_mlp, written
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL, STARTING_VALUES
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.parallel.spec import Parallel
from archcompass.errors import ConversionError


def read(fields: Fields) -> ModelSpec:
    """The model of a Falcon-H1 configuration."""
    fields.expect("mamba_use_mlp", True)
    mixers = Parallel(branches={"mamba": _mamba(fields), "attention": _attention(fields)})
    gate, down = fields.sequence("mlp_multipliers", (1.0, 1.0), 2)
    mlp = read_mlp(fields).model_copy(update={"gate_multiplier": float(gate), "down_multiplier": float(down)})
    return assemble(
        fields,
        [[Part("mixers", mixers), Part("mlp", mlp)]] * fields.integer("num_hidden_layers"),
        eps=1e-5,
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        logit_multiplier=fields.number("lm_head_multiplier", 1.0),
    )


def _mamba(fields: Fields) -> Mamba2:
    width, bias = fields.integer("hidden_size"), fields.flag("mamba_proj_bias", False)
    fields.expect("projectors_bias", bias)
    expanded = int(fields.number("mamba_expand", 2) * width)
    absent = expanded if "mamba_d_ssm" in fields.config else 1024
    return read_mamba(
        fields,
        eps=1e-5,
        inner=fields.integer("mamba_d_ssm", absent),
        norm="group" if fields.flag("mamba_rms_norm", False) else "none",
        norm_before_gate=fields.flag("mamba_norm_before_gate", True),
        in_multiplier=fields.number("ssm_in_multiplier", 1.0),
        out_multiplier=fields.number("ssm_out_multiplier", 1.0),
        multipliers=tuple(fields.sequence("ssm_multipliers", (1.0,) * 5, 5)),
    )


def _attention(fields: Fields) -> Attention:
    return read_attention(
        fields,
        kv_heads=8,
        qkv_bias=fields.flag("attention_bias", False),
        in_multiplier=fields.number("attention_in_multiplier", 1.0),
        key_multiplier=fields.number("key_multiplier", 1.0),
        out_multiplier=fields.number("attention_out_multiplier", 1.0),
    )


def _branches(block: Parallel) -> tuple[Attention, Mamba2]:
    """Attention and Mamba-2, whatever the branches are called."""
    found = {type(branch): branch for branch in block.branches.values()}
    attention, mamba = found.get(Attention), found.get(Mamba2)
    if not isinstance(attention, Attention) or not isinstance(mamba, Mamba2) or len(block.branches) != 2:
        raise ConversionError(f"branches are {sorted(block.branches)}; falcon_h1 has an attention and a mamba2")
    return attention, mamba


def write(spec: ModelSpec) -> dict[str, Any]:
    """Falcon-H1's keys."""
    attention, mamba = _branches(first(spec, Parallel, "falcon_h1"))
    mlp = first(spec, GatedMLP, "falcon_h1")
    said = written(spec, attention) | write_mamba(mamba) | write_mlp(mlp)
    return said | {
        "mamba_d_ssm": mamba.inner_width,
        "mamba_rms_norm": mamba.norm == "group",
        "mamba_norm_before_gate": mamba.norm_before_gate,
        "projectors_bias": mamba.use_bias,
        "ssm_in_multiplier": mamba.in_multiplier,
        "ssm_out_multiplier": mamba.out_multiplier,
        "ssm_multipliers": list(mamba.multipliers),
        "attention_bias": attention.qkv_bias,
        "attention_in_multiplier": attention.in_multiplier,
        "attention_out_multiplier": attention.out_multiplier,
        "key_multiplier": attention.key_multiplier,
        "mlp_bias": mlp.bias,
        "mlp_multipliers": [mlp.gate_multiplier, mlp.down_multiplier],
        "embedding_multiplier": spec.embedding_multiplier,
        "lm_head_multiplier": spec.logit_multiplier,
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Falcon-H1's tensors."""
    yield from parts.ends(spec, norm="model.final_layernorm.weight")
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        norm = "pre_ff_layernorm" if place.part else "input_layernorm"
        yield same(f"{ours}.before.weight", f"{theirs}.{norm}.weight")
        if isinstance(place.block, Parallel):
            for name, branch in place.block.branches.items():
                if isinstance(branch, Attention):
                    yield from parts.attention(f"{ours}.block.branches.{name}", f"{theirs}.self_attn", branch)
                elif isinstance(branch, Mamba2):
                    yield from parts.mamba2(f"{ours}.block.branches.{name}", f"{theirs}.mamba", branch)
        elif isinstance(place.block, GatedMLP):
            yield from parts.mlp(f"{ours}.block", f"{theirs}.feed_forward", place.block)


FAMILY = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    no_effect=(*NUMERICS_NEUTRAL, *STARTING_VALUES, "mlp_expansion_factor", "attn_layer_indices"),
)
