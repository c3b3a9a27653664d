"""MiniMax-Text-01 and M1 under the key names of their own repositories; the model is that of `minimax`."""

from __future__ import annotations

from typing import Any

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.hf.families import minimax
from archcompass.blocks.hf.family import Family, first
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm

_KEYS = {"attention": "full_attention", "linear": "linear_attention", "moe": "mlp"}


def read(fields: Fields) -> ModelSpec:
    """The model of a MiniMax-M1 configuration; 1 in `attn_type_list` is softmax attention, 0 is lightning."""
    fields.expect("postnorm", True)
    fields.expect("shared_intermediate_size", 0)
    norm = RMSNorm(eps=fields.number("rms_norm_eps", 1e-5))
    joins = {
        name: Residual(
            norm=norm,
            skip="normed",
            skip_multiplier=fields.number(f"layernorm_{key}_alpha", 1.0),
            multiplier=fields.number(f"layernorm_{key}_beta", 1.0),
        )
        for name, key in _KEYS.items()
    }
    kinds = ["attention" if kind == 1 else "linear" for kind in fields.sequence("attn_type_list")]
    return minimax.read_layers(fields, kinds, joins)


def write(spec: ModelSpec) -> dict[str, Any]:
    """The keys of MiniMax's own repositories."""
    said = minimax.write(spec)
    kinds = said.pop("layer_types")
    said["attn_type_list"] = [int(kind == "full_attention") for kind in kinds]
    for key, name in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp")):
        said[f"layernorm_{name}_alpha"] = said.pop(f"{key}_alpha_factor", 1.0)
        said[f"layernorm_{name}_beta"] = said.pop(f"{key}_beta_factor", 1.0)
    attention = first(spec, Attention, "minimax_m1")
    rope = said.pop("rope_parameters")
    return said | {
        "postnorm": True,
        "rope_theta": rope["rope_theta"],
        "rotary_dim": attention.rope.rotary_dim(attention.head_dim) if attention.rope else None,
    }


FAMILY = Family(
    model_type="minimax_m1",
    architecture="MiniMaxM1ForCausalLM",
    read=read,
    write=write,
    weights=minimax.weights,
    no_effect=("shared_moe_mode", "max_model_len"),
    unused=minimax.UNUSED,
)
