"""DeepSeek-V3.2: V3 whose queries attend only to the keys that a lightning indexer ranks highest. `DeepseekV32Config`.

transformers leaves out the Hadamard rotation that the released code applies to the indexer's queries and keys; it changes
no score, since it is orthogonal and on both sides.
"""

from __future__ import annotations

from typing import Any

from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf.families import deepseek_v3
from archcompass.blocks.hf.families.glm4_moe import write_experts
from archcompass.blocks.hf.family import Family, first, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.mla.spec import MLA, Indexer
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE
from archcompass.errors import ConversionError


def read(fields: Fields) -> ModelSpec:
    """The model of a DeepSeek-V3.2 configuration."""
    indexer = Indexer(
        n_heads=fields.integer("index_n_heads", 64),
        head_dim=fields.integer("index_head_dim", 128),
        topk=fields.integer("index_topk", 2048),
    )
    fields.expect("mlp_bias", False)
    depth = fields.integer("num_hidden_layers")
    fields.expect("layer_types", ["indexed_attention"] * depth)
    dense = fields.integer("first_k_dense_replace", 3)
    default = ["dense" if layer < dense else "sparse" for layer in range(depth)]
    if fields.kinds("mlp_layer_types", default, "dense", "sparse") != default:
        fields.refuse("mlp_layer_types", "another list", f"dense for the first {dense} (first_k_dense_replace)")
    attention = deepseek_v3.read_latent(fields, rope=read_rope(fields, interleaved=True), indexer=indexer)
    return deepseek_v3.read_with(fields, attention)


def write(spec: ModelSpec) -> dict[str, Any]:
    """DeepSeek-V3.2's keys."""
    attention = first(spec, MLA, "deepseek_v32")
    if attention.indexer is None:
        raise ConversionError("blocks.attention.indexer is None; every deepseek_v32 model has one")
    sparse = ["dense" if isinstance(place.block, GatedMLP) else "sparse" for place in places(spec) if place.part]
    return (
        deepseek_v3.write_latent(spec, attention)
        | write_experts(spec, first(spec, MoE, "deepseek_v32"))
        | {
            "index_n_heads": attention.indexer.n_heads,
            "index_head_dim": attention.indexer.head_dim,
            "index_topk": attention.indexer.topk,
            "mlp_layer_types": sparse,
        }
    )


FAMILY = Family(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    read=read,
    write=write,
    weights=deepseek_v3.weights,
    aliases={"num_mtp_layers": "num_nextn_predict_layers", "num_experts": "n_routed_experts"},
    no_effect=deepseek_v3.NO_EFFECT,
)
