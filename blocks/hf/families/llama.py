"""Llama 2 and 3 (arXiv 2407.21783): pre-norm, grouped-query attention, SwiGLU. transformers `LlamaConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, sizes, stack, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope, write_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm


def read(fields: Fields) -> ModelSpec:
    """The model of a Llama configuration."""
    mlp = read_mlp(fields)
    attention = read_attention(fields, qkv_bias=fields.flag("attention_bias", False))
    return assemble(fields, [[Part("attention", attention), Part("mlp", mlp)]] * fields.integer("num_hidden_layers"))


def read_attention(fields: Fields, *, theta: float = 10000.0, **options: Any) -> Attention:
    """The attention that Llama and its descendants configure; `attention_bias` covers the output as well unless said."""
    heads = fields.integer("num_attention_heads")
    bias = options.pop("qkv_bias", False)
    return Attention(
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", options.pop("kv_heads", heads)),
        head_dim=fields.integer("head_dim", options.pop("head_dim", fields.integer("hidden_size") // heads)),
        qkv_bias=bias,
        output_bias=options.pop("output_bias", bias),
        rope=options.pop("rope") if "rope" in options else read_rope(fields, theta=theta),
        **options,
    )


def read_mlp(fields: Fields) -> GatedMLP:
    """The SwiGLU of Llama and its descendants."""
    act, bias = fields.choice("hidden_act", HF_NAMES, "silu"), fields.flag("mlp_bias", False)
    return GatedMLP(intermediate_size=fields.integer("intermediate_size"), hidden_act=act, bias=bias)


def assemble(fields: Fields, layers: list[list[Part]], eps: float = 1e-6, **more: Any) -> ModelSpec:
    """A pre-norm model of these layers."""
    norm = RMSNorm(eps=fields.number("rms_norm_eps", eps))
    return ModelSpec(**(sizes(fields) | {"residual": Residual(norm=norm), "norm": norm} | more | stack(layers)))


def write(spec: ModelSpec) -> dict[str, Any]:
    """Llama's keys."""
    attention, mlp = first(spec, Attention, "llama"), first(spec, GatedMLP, "llama")
    return written(spec, attention) | write_mlp(mlp) | {"attention_bias": attention.qkv_bias, "mlp_bias": mlp.bias}


def written(spec: ModelSpec, attention: Attention) -> dict[str, Any]:
    """Keys that Llama shares with its descendants."""
    rope = {} if attention.rope is None else {"rope_parameters": write_rope(attention.rope)}
    return written_sizes(spec) | {
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": norm_eps(spec),
        **rope,
    }


def write_mlp(mlp: GatedMLP) -> dict[str, Any]:
    """Keys of a dense MLP."""
    return {"intermediate_size": mlp.intermediate_size, "hidden_act": hf_activation(mlp.hidden_act)}


def hf_activation(name: str) -> str:
    """HF's spelling of a nonlinearity."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Llama's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = place.ours, f"model.layers.{place.layer}"
        if isinstance(place.block, Attention):
            yield same(f"{ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.attention(f"{ours}.block", f"{theirs}.self_attn", place.block)
        elif isinstance(place.block, GatedMLP):
            yield same(f"{ours}.before.weight", f"{theirs}.post_attention_layernorm.weight")
            yield from parts.mlp(f"{ours}.block", f"{theirs}.mlp", place.block)


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=read, write=write, weights=weights)
