"""Mamba-1 (arXiv 2312.00752): one mixer a layer, tied head. transformers `MambaConfig`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from archcompass.blocks.hf import parts
from archcompass.blocks.hf.families.mamba2 import NUMERICS_NEUTRAL, STARTING_VALUES, write_expansion
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, sizes, stack, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba.spec import Mamba
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm


def read(fields: Fields) -> ModelSpec:
    """The model of a Mamba configuration; the head is tied unless it says otherwise."""
    fields.expect("hidden_act", "silu", "swish")
    width = fields.integer("hidden_size")
    for key, said in (
        ("d_model", width),
        ("n_layer", fields.integer("num_hidden_layers")),
        ("rms_norm", True),
        ("ssm_cfg", {}),
    ):
        fields.expect(key, said)
    inner = int(fields.number("expand", 2) * width)
    fields.expect("intermediate_size", inner)
    mixer = Mamba(
        intermediate_size=inner,
        state_size=fields.integer("state_size", 16),
        conv_kernel=fields.integer("conv_kernel", 4),
        time_step_rank=read_rank(fields, "time_step_rank"),
        use_bias=fields.flag("use_bias", False),
        use_conv_bias=fields.flag("use_conv_bias", True),
    )
    norm = RMSNorm(eps=fields.number("layer_norm_epsilon", 1e-5))
    layers = stack([[Part("mamba", mixer)]] * fields.integer("num_hidden_layers"))
    tied = {"tie_word_embeddings": True}
    return ModelSpec(**(sizes(fields, **tied) | {"residual": Residual(norm=norm), "norm": norm} | layers))


def read_rank(fields: Fields, key: str) -> int:
    """The time step's rank; "auto" is a sixteenth of the width."""
    return fields.automatic(key, math.ceil(fields.integer("hidden_size") / 16))


def write(spec: ModelSpec) -> dict[str, Any]:
    """Mamba's keys."""
    mixer = first(spec, Mamba, "mamba")
    inner, width = mixer.intermediate_size, spec.hidden_size
    return written_sizes(spec) | {
        "intermediate_size": inner,
        "expand": write_expansion(inner, width),
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_kernel,
        "time_step_rank": mixer.time_step_rank,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.use_conv_bias,
        "layer_norm_epsilon": norm_eps(spec),
        "hidden_act": "silu",
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Mamba's tensors."""
    yield from parts.ends(spec, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for place in places(spec):
        theirs = f"backbone.layers.{place.layer}"
        yield same(f"{place.ours}.before.weight", f"{theirs}.norm.weight")
        if isinstance(place.block, Mamba):
            yield from parts.mamba(f"{place.ours}.block", f"{theirs}.mixer", place.block)


WAYS_TO_COMPUTE = (
    "fused_add_norm",
    "pad_vocab_size_multiple",
    "use_mambapy",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_falcon_mambapy",
)
"""Keys that choose one of several implementations of the same scan."""

FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    read=read,
    write=write,
    weights=weights,
    aliases={"d_inner": "intermediate_size"},
    no_effect=tuple(key for key in (*STARTING_VALUES, *NUMERICS_NEUTRAL, *WAYS_TO_COMPUTE) if key != "time_step_rank"),
)
