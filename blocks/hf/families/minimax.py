"""MiniMax-Text-01 and M1 (arXiv 2501.08313, 2506.13585): lightning attention, every eighth layer softmax, experts.

transformers `MiniMaxConfig`. What a sublayer adds to is its own normed input, times alpha. The released weights turn half
of every head (`rotary_dim`); transformers 5.23 turns the whole head whatever the configuration says, so a configuration
that asks for half is read as it was trained, and is the one case where its logits differ from ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import assemble, read_attention, written
from archcompass.blocks.hf.families.mixtral import read_experts, write_experts
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.lightning.spec import Lightning
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.norm.spec import RMSNorm


def read(fields: Fields) -> ModelSpec:
    """The model of a MiniMax configuration."""
    depth = fields.integer("num_hidden_layers")
    default = ["linear_attention" if layer % 2 else "full_attention" for layer in range(depth)]
    kinds = fields.kinds("layer_types", default, "linear_attention", "full_attention")
    joins = {
        name: _join(fields, fields.number(f"{key}_alpha_factor", 1.0), fields.number(f"{key}_beta_factor", 1.0))
        for name, key in (("attention", "full_attn"), ("linear", "linear_attn"), ("moe", "mlp"))
    }
    return read_layers(fields, ["attention" if kind == "full_attention" else "linear" for kind in kinds], joins)


def _join(fields: Fields, alpha: float, beta: float) -> Residual:
    norm = RMSNorm(eps=fields.number("rms_norm_eps", 1e-5))
    return Residual(norm=norm, skip="normed", skip_multiplier=alpha, multiplier=beta)


def read_layers(fields: Fields, kinds: list[str], joins: dict[str, Residual]) -> ModelSpec:
    """The model with a mixer of each of these kinds ("attention" or "linear"), joined as `joins` says."""
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    turned = fields.integer("rotary_dim", head_dim)
    fields.expect("sliding_window")
    blocks = {
        "attention": read_attention(
            fields, kv_heads=8, head_dim=head_dim, rope=read_rope(fields, theta=1e6, factor=turned / head_dim)
        ),
        "linear": Lightning(
            num_attention_heads=heads,
            head_dim=head_dim,
            num_hidden_layers=fields.integer("num_hidden_layers"),
            hidden_act=fields.choice("hidden_act", HF_NAMES, "silu"),
        ),
    }
    moe = Part("moe", read_experts(fields), joins["moe"])
    layers = [[Part(kind, blocks[kind], joins[kind]), moe] for kind in kinds]
    if len({*joins.values()}) == 1:
        layers = [[part._replace(residual=None) for part in layer] for layer in layers]
        return assemble(fields, layers, eps=1e-5, residual=joins["moe"])
    return assemble(fields, layers, eps=1e-5)


def write(spec: ModelSpec) -> dict[str, Any]:
    """MiniMax's keys."""
    attention, moe = first(spec, Attention, "minimax"), first(spec, MoE, "minimax")
    kinds = [place for place in places(spec) if place.part == 0]
    factors: dict[str, float] = {}
    for name, block in spec.blocks.items():
        key = {Attention: "full_attn", Lightning: "linear_attn", MoE: "mlp"}[type(block)]
        join = spec.residual_of(name)
        factors |= {f"{key}_alpha_factor": join.skip_multiplier, f"{key}_beta_factor": join.multiplier}
    eps = norm_eps(spec) if not spec.residuals else next(iter(spec.residuals.values())).norm.eps  # type: ignore[attr-defined]
    return (
        written(spec, attention)
        | write_experts(moe)
        | factors
        | {
            "rms_norm_eps": eps,
            "layer_types": [
                "full_attention" if isinstance(place.block, Attention) else "linear_attention" for place in kinds
            ],
        }
    )


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """MiniMax's tensors."""
    yield from parts.ends(spec)
    for place in places(spec):
        ours, theirs = f"{place.ours}.block", f"model.layers.{place.layer}"
        norm = "post_attention_layernorm" if place.part else "input_layernorm"
        yield same(f"{place.ours}.before.weight", f"{theirs}.{norm}.weight")
        match place.block:
            case Lightning():
                yield from parts.linear(f"{ours}.qkv", f"{theirs}.self_attn.qkv_proj")
                yield from parts.linear(f"{ours}.gate", f"{theirs}.self_attn.output_gate")
                yield from parts.linear(f"{ours}.output", f"{theirs}.self_attn.out_proj")
                yield same(f"{ours}.norm_weight", f"{theirs}.self_attn.norm.weight")
            case Attention():
                yield from parts.attention(ours, f"{theirs}.self_attn", place.block)
            case MoE():
                yield from parts.experts(ours, f"{theirs}.block_sparse_moe", place.block, ("w1", "w3", "w2"))


UNUSED = (r".*rotary_emb\.inv_freq$", r".*\.(slope_rate|query_decay|key_decay|diagonal_decay)$")
"""What transformers keeps of the decays, which follow from the shape."""

FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"num_experts": "num_local_experts"},
    no_effect=("block_size",),
    unused=UNUSED,
)
