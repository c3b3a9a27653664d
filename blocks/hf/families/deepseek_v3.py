"""DeepSeek-V3 (arXiv 2412.19437), V3.1 and Kimi K2: latent attention, the first layers dense, experts in groups.

transformers `DeepseekV3Config`. Queries and keys turn in neighbouring pairs; yarn's factor is in the softmax's scale as well.
The prediction heads for further tokens (MTP) that a checkpoint may hold are not part of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.glm4_moe import layers_with_experts, read_experts, write_experts
from archcompass.blocks.hf.families.llama import assemble
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope, write_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mla.spec import MLA
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def read(fields: Fields) -> ModelSpec:
    """The model of a DeepSeek-V3 configuration."""
    rope = read_rope(fields, interleaved=fields.flag("rope_interleave", True))
    return read_with(fields, read_latent(fields, rope=rope))


def read_with(fields: Fields, attention: MLA) -> ModelSpec:
    """DeepSeek-V3's model around an attention."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    fields.expect("moe_layer_freq", 1)
    moe = read_experts(fields, scaling=2.5, experts=256, groups=8, kept=4)
    return assemble(fields, layers_with_experts(fields, Part("attention", attention), moe, dense=3))


def read_latent(fields: Fields, rank: int | None = 1536, **options: Any) -> MLA:
    """Latent attention; its inner norms have an epsilon of 1e-6 whatever the configuration says."""
    heads, rotary = fields.integer("num_attention_heads"), fields.integer("qk_rope_head_dim", 64)
    fields.expect("num_key_value_heads", heads)
    fields.take("head_dim", None)
    nope = fields.integer("qk_nope_head_dim", 128)
    fields.expect("qk_head_dim", nope + rotary)
    return MLA(
        num_attention_heads=heads,
        q_lora_rank=fields.integer("q_lora_rank", None if "q_lora_rank" in fields.config else rank),
        kv_lora_rank=fields.integer("kv_lora_rank", 512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=fields.integer("v_head_dim", 128),
        bias=fields.flag("attention_bias", False),
        **options,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """DeepSeek-V3's keys."""
    attention = first(spec, MLA, "deepseek_v3")
    rope = {} if attention.rope is None else {"rope_interleave": attention.rope.interleaved}
    return write_latent(spec, attention) | write_experts(spec, first(spec, MoE, "deepseek_v3")) | rope


def write_latent(spec: ModelSpec, attention: MLA) -> dict[str, Any]:
    """Keys of latent attention."""
    return written_sizes(spec) | {
        "rms_norm_eps": norm_eps(spec),
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": attention.bias,
        **({} if attention.rope is None else {"rope_parameters": write_rope(attention.rope)}),
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """DeepSeek-V3's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "post_attention_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case MLA():
                yield from parts.latent_attention(ours, f"{theirs}.self_attn", place.block)
            case MoE():
                yield from parts.experts(ours, f"{theirs}.mlp", place.block, shared="shared_experts")
            case GatedMLP():
                yield from parts.mlp(ours, f"{theirs}.mlp", place.block)


NO_EFFECT = ("num_nextn_predict_layers", "ep_size")

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
    no_effect=NO_EFFECT,
)
