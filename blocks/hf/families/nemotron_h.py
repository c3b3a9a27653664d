"""Nemotron-H and Nemotron 3 (arXiv 2504.03624): one sublayer a layer, Mamba-2, attention without positions, MLP or experts.

transformers `NemotronHConfig`. Its forward clamps the time step at `time_step_min` whatever `time_step_limit` says, and its
single-token path does not clamp at all; here every path clamps, as its forward does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import Block
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import hf_activation
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL
from archcompass.blocks.hf.family import Family, Part, norm_eps, places, sizes, stack, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.errors import ConversionError

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}


def read(fields: Fields) -> ModelSpec:
    """The model of a Nemotron-H configuration."""
    kinds = _kinds(fields)
    readers = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}
    blocks = {kind: reader(fields) for kind, reader in readers.items()}
    norm = RMSNorm(eps=fields.number("layer_norm_epsilon", 1e-5))
    if fields.integer("num_hidden_layers", len(kinds)) != len(kinds):
        fields.refuse("num_hidden_layers", fields.take("num_hidden_layers"), f"{len(kinds)}, the length of the pattern")
    layers = stack([[Part(kind, blocks[kind])] for kind in kinds])
    return ModelSpec(**(sizes(fields) | {"residual": Residual(norm=norm), "norm": norm} | layers))


def _kinds(fields: Fields) -> list[str]:
    """What each layer is: from the list, or from the pattern of letters."""
    pattern = fields.take("hybrid_override_pattern", None)
    listed = fields.sequence("layers_block_type", None)
    if listed is None:
        unknown = set(str(pattern or "?")) - set(_LETTERS)
        if unknown:
            fields.refuse("hybrid_override_pattern", pattern, "made of M, *, - and E")
        return [_LETTERS[letter] for letter in pattern]
    kinds = [_KINDS.get(kind, kind) for kind in listed]
    for kind in kinds:
        if kind not in _LETTERS.values():
            fields.refuse("layers_block_type", kind, " or ".join(_LETTERS.values()))
    return kinds


def _mamba(fields: Fields) -> Mamba2:
    fields.expect("mamba_hidden_act", "silu", "swish")
    fields.take("expand", None)
    return Mamba2(
        num_heads=fields.integer("mamba_num_heads", 128),
        head_dim=fields.integer("mamba_head_dim", 64),
        state_size=fields.integer("ssm_state_size", 128),
        n_groups=fields.integer("n_groups", 8),
        conv_kernel=fields.integer("conv_kernel", 4),
        time_step_limit=(fields.number("time_step_min", 1e-3), None),
        use_bias=fields.flag("use_bias", False),
        use_conv_bias=fields.flag("use_conv_bias", True),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
    )


def _attention(fields: Fields) -> Attention:
    heads = fields.integer("num_attention_heads", 32)
    fields.expect("attention_bias", False)
    fields.expect("sliding_window")
    return Attention(
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", 8),
        head_dim=fields.integer("head_dim", 128),
        rope=None,
    )


def _mlp(fields: Fields) -> GatedMLP:
    act = fields.choice("mlp_hidden_act", HF_NAMES, "relu2")
    bias = fields.flag("mlp_bias", False)
    return GatedMLP(
        intermediate_size=fields.integer("intermediate_size", 21504), hidden_act=act, gated=False, bias=bias
    )


def _moe(fields: Fields) -> MoE:
    fields.expect("n_shared_experts", 1)
    return MoE(
        num_experts=fields.integer("n_routed_experts", 8),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 2),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 7688),
        shared_expert_intermediate_size=fields.integer("moe_shared_expert_intermediate_size", 7688),
        latent_size=fields.integer("moe_latent_size", None),
        hidden_act=fields.choice("mlp_hidden_act", HF_NAMES, "relu2"),
        gated=False,
        **read_router(fields),
    )


def read_router(fields: Fields, scaling: float = 1.0, groups: int = 1, kept: int = 1) -> dict[str, Any]:
    """DeepSeek-V3's router, which many families took over: sigmoid, a bias for the choice alone, groups, scaling."""
    groups, kept = fields.integer("n_group", groups), fields.integer("topk_group", kept)
    return {
        "scoring_func": "sigmoid",
        "selection_bias": True,
        "router_in_fp32": True,
        "norm_topk_prob": fields.flag("norm_topk_prob", True),
        "routed_scaling_factor": fields.number("routed_scaling_factor", scaling),
        "n_group": groups if groups > 1 else None,
        "topk_group": kept if groups > 1 else None,
    }


def write_router(moe: MoE) -> dict[str, Any]:
    """The router's keys on their way back."""
    return {
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "n_group": moe.n_group or 1,
        "topk_group": moe.topk_group or 1,
    }


def write(spec: ModelSpec) -> dict[str, Any]:
    """Nemotron-H's keys."""
    letters = {"mamba2": "M", "attention": "*", "gated_mlp": "-", "moe": "E"}
    pattern = "".join(letters.get(place.block.kind, "?") for place in places(spec))
    written = written_sizes(spec) | {
        "hybrid_override_pattern": pattern,
        "layer_norm_epsilon": norm_eps(spec),
    }
    for block in spec.blocks.values():
        written |= _write_block(block)
    return written


def _write_block(block: Block) -> dict[str, Any]:
    match block:
        case Mamba2():
            return _write_mamba(block)
        case Attention():
            return _write_attention(block)
        case GatedMLP():
            return _write_mlp(block)
        case MoE():
            return _write_moe(block)
    raise ConversionError(f"blocks has a {block.kind}; nemotron_h is made of mamba2, attention, gated_mlp and moe")


def _write_mamba(block: Mamba2) -> dict[str, Any]:
    return {
        "mamba_num_heads": block.num_heads,
        "mamba_head_dim": block.head_dim,
        "ssm_state_size": block.state_size,
        "n_groups": block.n_groups,
        "conv_kernel": block.conv_kernel,
        "time_step_min": block.time_step_limit[0],
        "time_step_limit": [0.0, math.inf],
        "use_bias": block.use_bias,
        "use_conv_bias": block.use_conv_bias,
    }


def _write_attention(block: Attention) -> dict[str, Any]:
    return {
        "num_attention_heads": block.num_attention_heads,
        "num_key_value_heads": block.num_key_value_heads,
        "head_dim": block.head_dim,
    }


def _write_mlp(block: GatedMLP) -> dict[str, Any]:
    return {
        "intermediate_size": block.intermediate_size,
        "mlp_hidden_act": hf_activation(block.hidden_act),
        "mlp_bias": block.bias,
    }


def _write_moe(block: MoE) -> dict[str, Any]:
    return write_router(block) | {
        "n_routed_experts": block.num_experts,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": block.shared_expert_intermediate_size,
        "moe_latent_size": block.latent_size,
        "mlp_hidden_act": hf_activation(block.hidden_act),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Nemotron-H's tensors; every sublayer is called `mixer`."""
    yield from parts.ends(spec, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"backbone.layers.{place.layer}.mixer"
        yield same(f"{place.ours}.before.weight", f"backbone.layers.{place.layer}.norm.weight")
        match place.block:
            case Mamba2():
                yield from parts.mamba2(ours, theirs, place.block)
            case Attention():
                yield from parts.attention(ours, theirs, place.block)
            case GatedMLP():
                yield from parts.mlp(ours, theirs, place.block)
            case MoE():
                yield from parts.experts(ours, theirs, place.block, shared="shared_experts")
                if place.block.latent_size:
                    yield from parts.linear(f"{ours}.latent_in", f"{theirs}.fc1_latent_proj")
                    yield from parts.linear(f"{ours}.latent_out", f"{theirs}.fc2_latent_proj")


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={
        "layer_types": "layers_block_type",
        "num_local_experts": "n_routed_experts",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_dt_min": "time_step_min",
        "mamba_conv_bias": "use_conv_bias",
        "attention_head_dim": "head_dim",
        "norm_eps": "layer_norm_epsilon",
    },
    no_effect=(
        *NUMERICS_NEUTRAL,
        "time_step_limit",
        "mamba_dt_limit",
        "time_step_max",
        "mamba_dt_max",
        "time_step_floor",
        "mamba_dt_init_floor",
        "mamba_proj_bias",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "num_nextn_predict_layers",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
        "rope_theta",
        "partial_rotary_factor",
        "mamba_expand",
    ),
    unused=(r".*rotary_emb\.inv_freq$", r"(backbone|model)?\.?mtp\."),
)
