"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, many small experts. transformers `Qwen3NextConfig`.

Every norm's weight is stored as the distance from one, but the DeltaNet's own. The checkpoint keeps queries beside their
gates head by head, and the DeltaNet's projections grouped by key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_delta_net.spec import GatedDeltaNet
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, read_attention, read_mlp, write_mlp, written
from archcompass.blocks.hf.families.qwen3_moe import dense_layers, read_experts, write_experts
from archcompass.blocks.hf.family import Family, Part, blocks_of, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Permuted, Reshaped, Rows, Then, Weight, same
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.norm.spec import RMSNorm


def read(fields: Fields) -> ModelSpec:
    """The model of a Qwen3-Next configuration."""
    fields.expect("use_sliding_window", False)
    eps, depth = fields.number("rms_norm_eps", 1e-6), fields.integer("num_hidden_layers")
    attention = read_attention(
        fields,
        kv_heads=2,
        head_dim=256,
        qkv_bias=fields.flag("attention_bias", False),
        rope=read_rope(fields, factor=0.25),
        qk_norm="head",
        qk_norm_eps=eps,
        qk_norm_unit_offset=True,
        output_gate=True,
    )
    linear, moe, mlp = _linear(fields, eps), _experts(fields), read_mlp(fields)
    dense, every = dense_layers(fields), fields.integer("full_attention_interval", 4)
    default = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(depth)]
    kinds = fields.kinds("layer_types", default, "linear_attention", "full_attention")
    layers = [
        [
            Part("linear", linear) if kind == "linear_attention" else Part("attention", attention),
            Part("mlp", mlp) if layer in dense else Part("moe", moe),
        ]
        for layer, kind in enumerate(kinds)
    ]
    norm = RMSNorm(eps=eps, unit_offset=True)
    return assemble(fields, layers, residual=Residual(norm=norm), norm=norm)


def _linear(fields: Fields, eps: float) -> GatedDeltaNet:
    return GatedDeltaNet(
        num_key_heads=fields.integer("linear_num_key_heads", 16),
        num_value_heads=fields.integer("linear_num_value_heads", 32),
        key_head_dim=fields.integer("linear_key_head_dim", 128),
        value_head_dim=fields.integer("linear_value_head_dim", 128),
        conv_kernel=fields.integer("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )


def _experts(fields: Fields) -> MoE:
    shared = fields.integer("shared_expert_intermediate_size", 512)
    return read_experts(fields, normalised=True, shared_expert_intermediate_size=shared, shared_expert_gate=shared > 0)


def write(spec: ModelSpec) -> dict[str, Any]:
    """Qwen3-Next's keys."""
    attention, linear = first(spec, Attention, "qwen3_next"), first(spec, GatedDeltaNet, "qwen3_next")
    mixers = [place.block for place in places(spec) if place.part == 0]
    return (
        written(spec, attention)
        | _write_channel(spec)
        | write_linear(linear)
        | {
            "attention_bias": attention.qkv_bias,
            "layer_types": [
                "full_attention" if isinstance(mixer, Attention) else "linear_attention" for mixer in mixers
            ],
        }
    )


def _write_channel(spec: ModelSpec) -> dict[str, Any]:
    """Experts, with dense layers between them or not; or dense layers alone, which the class takes as well."""
    for moe in blocks_of(spec, MoE):
        return write_experts(spec, moe) | {"shared_expert_intermediate_size": moe.shared_expert_intermediate_size}
    mlp = first(spec, GatedMLP, "qwen3_next")
    return write_mlp(mlp) | {"mlp_only_layers": list(range(spec.num_hidden_layers))}


def write_linear(linear: GatedDeltaNet) -> dict[str, Any]:
    """Keys of a Gated DeltaNet."""
    return {
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_conv_kernel_dim": linear.conv_kernel,
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Qwen3-Next's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "post_attention_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case GatedDeltaNet():
                yield from _linear_weights(ours, f"{theirs}.linear_attn", place.block)
            case Attention():
                yield from gated_attention(ours, f"{theirs}.self_attn", place.block)
            case MoE():
                yield from parts.experts(ours, f"{theirs}.mlp", place.block)
            case GatedMLP():
                yield from parts.mlp(ours, f"{theirs}.mlp", place.block)


def gated_attention(ours: str, theirs: str, block: Attention) -> Iterator[Weight]:
    """Attention whose checkpoint keeps every head's queries right before their gates; ours has all queries first."""
    heads, dim, keys = block.num_attention_heads, block.head_dim, 2 * block.key_width
    split = [
        2 * dim * head + channel + gate * dim for gate in (0, 1) for head in range(heads) for channel in range(dim)
    ]
    order = (*split, *range(2 * block.query_width, 2 * block.query_width + keys))
    for weight in parts.attention(ours, theirs, block):
        if weight.ours.startswith(f"{ours}.qkv."):
            yield Weight(weight.ours, weight.theirs, Then(weight.form, Permuted(order)))
        else:
            yield weight


def _linear_weights(ours: str, theirs: str, block: GatedDeltaNet) -> Iterator[Weight]:
    channels, taps = block.conv_channels, block.conv_kernel
    sizes = (2 * block.key_width + 2 * block.value_width, 2 * block.num_value_heads)
    names = (f"{theirs}.in_proj_qkvz.weight", f"{theirs}.in_proj_ba.weight")
    yield Weight(f"{ours}.input.weight", names, Then(Rows(sizes), Permuted(tuple(_grouped(block)))))
    yield Weight(f"{ours}.conv_weight", (f"{theirs}.conv1d.weight",), Reshaped((channels, taps), (channels, 1, taps)))
    yield same(f"{ours}.a_log", f"{theirs}.A_log")
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias")
    yield same(f"{ours}.norm_weight", f"{theirs}.norm.weight")
    yield from parts.linear(f"{ours}.output", f"{theirs}.out_proj")


def _grouped(block: GatedDeltaNet) -> Iterator[int]:
    """Rows of the checkpoint in our order q, k, v, z, b, a: it keeps q, k, v, z, then b, a, of one key head after another."""
    heads, key, shared = block.num_key_heads, block.key_head_dim, block.num_value_heads // block.num_key_heads
    value = shared * block.value_head_dim
    group, start = 2 * key + 2 * value, 2 * block.key_width + 2 * block.value_width
    for offset, size in ((0, key), (key, key), (2 * key, value), (2 * key + value, value)):
        yield from (head * group + offset + row for head in range(heads) for row in range(size))
    for offset in (0, shared):
        yield from (start + head * 2 * shared + offset + row for head in range(heads) for row in range(shared))


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_local_experts": "num_experts"},
    unused=(r".*rotary_emb\.inv_freq$", r"mtp\."),
)
