"""MiniMax-M2: queries and keys normed over all heads together, a sigmoid router with a bias for the choice.

transformers `MiniMaxM2Config`. `rotary_dim` says how many channels of a head turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, read_attention, written
from archcompass.blocks.hf.families.mixtral import read_experts, write_experts
from archcompass.blocks.hf.family import Family, Part, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a MiniMax-M2 configuration."""
    head_dim = fields.integer("head_dim", 128)
    turned = fields.integer("rotary_dim", head_dim)
    fields.expect("use_qk_norm", True)
    fields.expect("qk_norm_type", "per_layer")
    fields.expect("scoring_func", "sigmoid")
    fields.expect("use_routing_bias", True)
    fields.expect("shared_intermediate_size", 0)
    fields.expect("attn_type_list", [1] * fields.integer("num_hidden_layers"))
    for part in ("full_attention", "linear_attention", "mlp"):
        fields.expect(f"layernorm_{part}_beta", 1)
    attention = read_attention(
        fields,
        kv_heads=8,
        head_dim=head_dim,
        qk_norm="all",
        qk_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope(fields, theta=5e6, factor=turned / head_dim),
    )
    moe = read_experts(fields, experts=256, chosen=8, scoring_func="sigmoid", selection_bias=True)
    return assemble(fields, [[Part("attention", attention), Part("moe", moe)]] * fields.integer("num_hidden_layers"))


def write(spec: ModelSpec) -> dict[str, Any]:
    """MiniMax-M2's keys."""
    attention, moe = first(spec, Attention, "minimax_m2"), first(spec, MoE, "minimax_m2")
    rope = attention.rope
    turned = {"rotary_dim": rope.rotary_dim(attention.head_dim)} if rope else {}
    return written(spec, attention) | write_experts(moe) | turned


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """MiniMax-M2's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        if isinstance(place.block, Attention):
            yield same(f"{ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
        elif isinstance(place.block, MoE):
            yield same(f"{ours}.before.weight", f"{theirs}.post_attention_layernorm.weight")
            experts = f"{theirs}.block_sparse_moe"
            yield from parts.experts(
                f"{ours}.block", experts, place.block, ("w1", "w3", "w2"), selection="e_score_correction_bias"
            )


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_experts": "num_local_experts"},
    no_effect=("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "shared_moe_mode", "max_model_len"),
    unused=(r".*rotary_emb\.inv_freq$", r"model\.mtp"),
)
