"""Kimi Linear (arXiv 2510.26692): Kimi Delta Attention, every fourth layer latent attention without positions, experts.

transformers `KimiLinearConfig`; the published files count layers from one and keep the linear part in a mapping of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.deepseek_v3 import read_latent, write_latent
from archcompass.blocks.hf.families.glm4_moe import read_experts, write_experts
from archcompass.blocks.hf.families.llama import assemble, read_mlp
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Reshaped, Rows, Then, Weight, same
from archcompass.blocks.kimi_delta.spec import KimiDelta
from archcompass.blocks.mla.spec import MLA
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a Kimi Linear configuration."""
    for key, said in (
        ("mla_use_nope", True),
        ("moe_router_activation_func", "sigmoid"),
        ("moe_layer_freq", 1),
        ("use_grouped_topk", True),
    ):
        fields.expect(key, said)
    depth, dense = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace", 1)
    mixers = {
        "full_attention": Part("attention", read_latent(fields, rope=None, rank=None)),
        "linear_attention": Part("linear", _linear(fields)),
    }
    moe, mlp = Part("moe", read_experts(fields, scaling=2.446, experts=256)), Part("mlp", read_mlp(fields))
    default = ["dense" if layer < dense else "sparse" for layer in range(depth)]
    channels = fields.kinds("mlp_layer_types", default, "dense", "sparse")
    layers = [
        [mixers[kind], mlp if channel == "dense" else moe]
        for kind, channel in zip(_kinds(fields, depth), channels, strict=True)
    ]
    return assemble(fields, layers, eps=1e-5)


def _kinds(fields: Fields, depth: int) -> list[str]:
    """What each layer mixes with: the mapping's lists count from one."""
    said = fields.mapping("linear_attn_config", {})
    if "full_attn_layers" in said:
        full = {layer - 1 for layer in said["full_attn_layers"]}
    else:
        full = {layer for layer in range(depth) if layer and layer % 4 == 0}
    default = ["full_attention" if layer in full else "linear_attention" for layer in range(depth)]
    return fields.kinds("layer_types", default, "full_attention", "linear_attention")


def _linear(fields: Fields) -> KimiDelta:
    said = fields.mapping("linear_attn_config", {})
    if unknown := sorted(set(said) - _LINEAR_KEYS):
        fields.refuse("linear_attn_config", unknown[0], " or ".join(sorted(_LINEAR_KEYS)))
    heads, dim = fields.integer("linear_num_heads", 32), fields.integer("linear_head_dim", 128)
    taps = fields.integer("linear_conv_kernel_dim", 4)
    return KimiDelta(
        num_attention_heads=said.get("num_heads", heads),
        head_dim=said.get("head_dim", dim),
        conv_kernel=said.get("short_conv_kernel_size", taps),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Kimi Linear's keys."""
    latent, linear = first(spec, MLA, "kimi_linear"), first(spec, KimiDelta, "kimi_linear")
    mixers = [place.block for place in places(spec) if place.part == 0]
    full = [layer for layer, mixer in enumerate(mixers, start=1) if isinstance(mixer, MLA)]
    said = write_latent(spec, latent) | write_experts(spec, first(spec, MoE, "kimi_linear"))
    for ours, theirs in _NAMES.items():
        if ours in said:
            said[theirs] = said.pop(ours)
    channels = ["dense" if isinstance(place.block, GatedMLP) else "sparse" for place in places(spec) if place.part]
    return said | {
        "mla_use_nope": True,
        "mlp_layer_types": channels,
        "linear_attn_config": {
            "full_attn_layers": full,
            "kda_layers": [layer for layer in range(1, len(mixers) + 1) if layer not in full],
            "num_heads": linear.num_attention_heads,
            "head_dim": linear.head_dim,
            "short_conv_kernel_size": linear.conv_kernel,
        },
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Kimi Linear's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "post_attention_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case MLA():
                yield from parts.latent_attention(ours, f"{theirs}.self_attn", place.block)
            case KimiDelta():
                yield from _linear_weights(ours, f"{theirs}.self_attn", place.block)
            case MoE():
                names = ("w1", "w3", "w2")
                yield from parts.experts(
                    ours, f"{theirs}.block_sparse_moe", place.block, names, shared="shared_experts"
                )
            case GatedMLP():
                # The published files call a dense layer's MLP `mlp`; transformers 5 writes it beside the experts' name.
                yield from parts.mlp(ours, f"{theirs}.mlp", place.block)
                yield from parts.mlp(ours, f"{theirs}.block_sparse_moe", place.block)


def _linear_weights(ours: str, theirs: str, block: KimiDelta) -> Iterator[Weight]:
    inner, rank, heads, taps = block.inner_width, block.head_dim, block.num_attention_heads, block.conv_kernel
    names = tuple(f"{theirs}.{name}_proj" for name in ("q", "k", "v", "f_a", "g_a", "b"))
    yield from parts.joined(f"{ours}.input", names, (inner, inner, inner, rank, rank, heads))
    filters = tuple(f"{theirs}.{name}_conv1d.weight" for name in "qkv")
    flat = Reshaped((3 * inner, taps), (3 * inner, 1, taps))
    yield Weight(f"{ours}.conv_weight", filters, Then(Rows((inner, inner, inner)), flat))
    yield from parts.linear(f"{ours}.decay", f"{theirs}.f_b_proj")
    yield Weight(f"{ours}.a_log", (f"{theirs}.A_log",), Reshaped((heads,), (1, 1, heads, 1)))
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias")
    yield from parts.linear(f"{ours}.gate", f"{theirs}.g_b_proj")
    yield same(f"{ours}.norm_weight", f"{theirs}.o_norm.weight")
    yield from parts.linear(f"{ours}.output", f"{theirs}.o_proj")


_LINEAR_KEYS = {"full_attn_layers", "kda_layers", "num_heads", "head_dim", "short_conv_kernel_size"}

_NAMES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_group": "num_expert_group",
    "norm_topk_prob": "moe_renormalize",
    "max_position_embeddings": "model_max_length",
}
"""DeepSeek's names of keys, and Kimi Linear's."""

FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={theirs: ours for ours, theirs in _NAMES.items()} | {"num_local_experts": "n_routed_experts"},
    no_effect=("num_nextn_predict_layers", "rope_theta", "rope_scaling", "rope_parameters"),
)
