"""Mamba-2 (arXiv 2405.21060). transformers `Mamba2Config`; published with one group and a tied head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from archcompass.blocks.hf import parts
from archcompass.blocks.hf.family import Family, Part, first, norm_eps, places, sizes, stack, written_sizes
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight, same
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.errors import ConversionError

STARTING_VALUES = (
    "time_step_rank",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_scale",
)
"""Keys that only say how a training run starts."""

NUMERICS_NEUTRAL = ("chunk_size", "mamba_chunk_size", "residual_in_fp32", "num_logits_to_keep")
"""Keys that change how it is computed (the size of a chunk, the dtype that sums are rounded to) and not what."""


def read(fields: Fields) -> ModelSpec:
    """The model of a Mamba-2 configuration: one mixer a layer, no MLP."""
    fields.expect("hidden_act", "silu", "swish")
    fields.expect("rms_norm", True)
    eps = fields.number("layer_norm_epsilon", 1e-5)
    heads, head_dim = fields.integer("num_heads", 128), fields.integer("head_dim", 64)
    check_inner(fields, "expand", heads * head_dim)
    mixer = Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_size=fields.integer("state_size", 128),
        n_groups=fields.integer("n_groups", 8),
        conv_kernel=fields.integer("conv_kernel", 4),
        time_step_limit=read_limit(fields.sequence("time_step_limit", (0.0, math.inf), 2)),
        use_bias=fields.flag("use_bias", False),
        use_conv_bias=fields.flag("use_conv_bias", True),
        norm_eps=eps,
    )
    norm = RMSNorm(eps=eps)
    layers = stack([[Part("mamba", mixer)]] * fields.integer("num_hidden_layers"))
    return ModelSpec(**(sizes(fields) | {"residual": Residual(norm=norm), "norm": norm} | layers))


def check_inner(fields: Fields, key: str, inner: int) -> None:
    """The key that says how many times the width the heads are together, which must agree with the heads."""
    said = fields.number(key, 2)
    width = fields.integer("hidden_size")
    if int(said * width) != inner:
        fields.refuse(key, said, f"{inner / width:g}, since the heads have {inner} channels together")


def write_expansion(inner: int, width: int) -> int:
    """How many times the width the mixer's channels are.

    Raises:
        ConversionError: no whole number, which transformers refuses.
    """
    if inner % width:
        raise ConversionError(f"the mixer has {inner} channels, no whole multiple of hidden_size ({width})")
    return inner // width


def read_limit(limit: Any) -> tuple[float, float | None]:
    """HF's pair of bounds on the time step."""
    low, high = limit
    return float(low), None if high is None or math.isinf(high) else float(high)


def write_limit(block: Mamba2) -> list[float]:
    """The pair on its way back."""
    low, high = block.time_step_limit
    return [low, math.inf if high is None else high]


def write(spec: ModelSpec) -> dict[str, Any]:
    """Mamba-2's keys."""
    mixer = first(spec, Mamba2, "mamba2")
    return written_sizes(spec) | {
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "expand": write_expansion(mixer.inner_width, spec.hidden_size),
        "state_size": mixer.state_size,
        "n_groups": mixer.n_groups,
        "conv_kernel": mixer.conv_kernel,
        "time_step_limit": write_limit(mixer),
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.use_conv_bias,
        "layer_norm_epsilon": norm_eps(spec),
        "hidden_act": "silu",
    }


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """Mamba-2's tensors."""
    yield from parts.ends(spec, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for place in places(spec):
        theirs = f"backbone.layers.{place.layer}"
        yield same(f"{place.ours}.before.weight", f"{theirs}.norm.weight")
        if isinstance(place.block, Mamba2):
            yield from parts.mamba2(f"{place.ours}.block", f"{theirs}.mixer", place.block)


FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    read=read,
    write=write,
    weights=weights,
    # The norm stands after the gate whatever `norm_before_gate` says; published files set it without being heard.
    no_effect=(*STARTING_VALUES, *NUMERICS_NEUTRAL, "norm_before_gate"),
)
