"""Zamba2 (arXiv 2411.15242): Mamba-2 layers, some of them guided by one of a few shared transformer blocks.

transformers `Zamba2Config`. The shared blocks alternate; every place has its own low-rank adapters, kept in the checkpoint
under the place where the shared block stands first. Its forward clamps the time step at `time_step_min`, its single-token
path does not; here every path clamps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from archcompass.blocks.activations import HF_NAMES
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.guided.spec import Guided
from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.llama import hf_activation
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL, check_inner, write_expansion
from archcompass.blocks.hf.family import Family, Part, Place, first, norm_eps, places, sizes, stack, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.rope import read_rope, write_rope
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.errors import ConversionError


def read(fields: Fields) -> ModelSpec:
    """The model of a Zamba2 configuration."""
    depth = fields.integer("num_hidden_layers", len(fields.sequence("layers_block_type")))
    kinds = fields.kinds("layers_block_type", ["linear_attention"] * depth, "linear_attention", "hybrid")
    shared = fields.integer("num_mem_blocks", 1)
    fields.expect("use_long_context", False)
    mamba, norm = _mamba(fields), RMSNorm(eps=fields.number("rms_norm_eps", 1e-5))
    guided, alone = _guided(fields, mamba), Residual(position="none")
    layers: list[list[Part]] = []
    places_of_guides = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    for layer in range(len(kinds)):
        if layer in places_of_guides:
            layers.append([Part(f"guided_{places_of_guides.index(layer) % shared + 1}", guided, alone)])
        else:
            layers.append([Part("mamba", mamba)])
    built = stack(layers)
    names = tuple(name for name in built["blocks"] if name.startswith("guided"))
    tied = {"tie_word_embeddings": True}
    return ModelSpec(
        **(sizes(fields, **tied) | {"residual": Residual(norm=norm), "norm": norm, "shared": names} | built)
    )


def _mamba(fields: Fields) -> Mamba2:
    heads, width = fields.integer("n_mamba_heads", 8), fields.integer("hidden_size")
    inner = int(fields.number("mamba_expand", 2) * width)
    check_inner(fields, "mamba_expand", inner)
    fields.expect("mamba_headdim", inner // heads)
    fields.expect("use_conv_bias", True)
    return Mamba2(
        num_heads=heads,
        head_dim=inner // heads,
        state_size=fields.integer("mamba_d_state", 64),
        n_groups=fields.integer("mamba_ngroups", 1),
        conv_kernel=fields.integer("mamba_d_conv", 4),
        time_step_limit=(fields.number("time_step_min", 1e-3), None),
        use_bias=fields.flag("add_bias_linear", False),
        norm_eps=1e-5,
    )


def _guided(fields: Fields, mamba: Mamba2) -> Guided:
    heads, width = fields.integer("num_attention_heads", 32), fields.integer("hidden_size")
    head_dim = 2 * width // heads
    rope = read_rope(fields)
    for key, said in (("attention_head_dim", head_dim), ("attention_hidden_size", 2 * width)):
        fields.expect(key, said)
    attention = Attention(
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=rope if fields.flag("use_mem_rope", False) else None,
        scale=(head_dim / 2) ** -0.5,
    )
    return Guided(
        mixer=mamba,
        attention=attention,
        intermediate_size=fields.integer("intermediate_size", 4 * width),
        hidden_act=fields.choice("hidden_act", HF_NAMES, "gelu"),
        mlp_bias=fields.flag("add_bias_linear", False),
        adapter_rank=fields.integer("adapter_rank", 128),
        attention_adapters=fields.flag("use_shared_attention_adapter", False),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Zamba2's keys."""
    guided = first(spec, Guided, "zamba2")
    mamba, attention = guided.mixer, guided.attention
    if not isinstance(mamba, Mamba2):
        raise ConversionError(f"blocks guide a {mamba.kind}; zamba2 guides a mamba2")
    inner, width = mamba.inner_width, spec.hidden_size
    return written_sizes(spec) | {
        "layers_block_type": ["hybrid" if isinstance(place.block, Guided) else "mamba" for place in places(spec)],
        "num_mem_blocks": len(spec.shared),
        "rms_norm_eps": norm_eps(spec),
        "n_mamba_heads": mamba.num_heads,
        "mamba_expand": write_expansion(inner, width),
        "mamba_d_state": mamba.state_size,
        "mamba_ngroups": mamba.n_groups,
        "mamba_d_conv": mamba.conv_kernel,
        "time_step_min": mamba.time_step_limit[0],
        "add_bias_linear": mamba.use_bias,
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "use_mem_rope": attention.rope is not None,
        **({} if attention.rope is None else {"rope_parameters": write_rope(attention.rope)}),
        "intermediate_size": guided.intermediate_size,
        "hidden_act": hf_activation(guided.hidden_act),
        "adapter_rank": guided.adapter_rank,
        "use_shared_attention_adapter": guided.attention_adapters,
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Zamba2's tensors."""
    yield from parts.ends(spec, norm="model.final_layernorm.weight")
    homes: dict[str, int] = {}
    number = 0
    for place in places(spec):
        theirs = f"model.layers.{place.layer}"
        if isinstance(place.block, Guided):
            home = f"model.layers.{homes.setdefault(place.name, place.layer)}.shared_transformer"
            yield from _guided_weights(place, place.block, theirs, home, number)
            number += 1
        elif isinstance(place.block, Mamba2):
            yield same(f"{place.ours}.before.weight", f"{theirs}.input_layernorm.weight")
            yield from parts.mamba2(f"{place.ours}.block", f"{theirs}.mamba", place.block)


def _guided_weights(place: Place, block: Guided, theirs: str, home: str, number: int) -> Iterator[Weight]:
    """A place's own tensors, those of its shared block, and adapter `number`, which the shared block keeps for it."""
    ours = f"{place.ours}.block"
    yield same(f"{ours}.into.weight", f"{theirs}.linear.weight")
    yield same(f"{ours}.norm.weight", f"{theirs}.mamba_decoder.input_layernorm.weight")
    if isinstance(block.mixer, Mamba2):
        yield from parts.mamba2(f"{ours}.mixer", f"{theirs}.mamba_decoder.mamba", block.mixer)
    yield same(f"{ours}.guide.attention_norm.weight", f"{home}.input_layernorm.weight")
    yield same(f"{ours}.guide.mlp_norm.weight", f"{home}.pre_ff_layernorm.weight")
    yield from parts.attention(f"{ours}.guide.attention", f"{home}.self_attn", block.attention)
    yield from parts.linear(f"{ours}.guide.mlp.inward", f"{home}.feed_forward.gate_up_proj", block.mlp_bias)
    yield from parts.linear(f"{ours}.guide.mlp.down", f"{home}.feed_forward.down_proj", block.mlp_bias)
    adapters = [(f"{ours}.mlp_adapter", f"{home}.feed_forward.gate_up_proj_adapter_list")]
    if block.attention_adapters:
        adapters += [
            (f"{ours}.attention_adapters.{index}", f"{home}.self_attn.linear_{letter}_adapter_list")
            for index, letter in enumerate("qkv")
        ]
    for mine, yours in adapters:
        yield same(f"{mine}.down.weight", f"{yours}.{number}.0.weight")
        yield same(f"{mine}.up.weight", f"{yours}.{number}.1.weight")


FAMILY = Family(
    model_type="zamba2",
    architecture="Zamba2ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"layer_types": "layers_block_type"},
    no_effect=(
        *NUMERICS_NEUTRAL,
        "time_step_limit",
        "time_step_max",
        "time_step_floor",
        "use_mamba_kernels",
        "use_mem_eff_path",
        "hybrid_layer_ids",
        "kv_channels",
        "num_query_groups",
    ),
)
