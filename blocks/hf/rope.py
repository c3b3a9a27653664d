"""Rotary positions in configurations: `rope_theta` and `rope_scaling` of old, `rope_parameters` of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.rope import Rope
from archcompass.errors import ConversionError

_OLD_NAMES = {"type": "rope_type", "rope_theta": "theta"}


def read_rope(
    fields: Fields, *, theta: float = 10000.0, factor: float = 1.0, interleaved: bool = False, layer_type: str = ""
) -> Rope:
    """The rope of a configuration.

    Args:
        fields: the configuration.
        theta, factor: what the family's class assumes where the file is silent (base, share of the channels that turn).
        interleaved: the family turns neighbouring channels.
        layer_type: which entry to read where `rope_parameters` has one per kind of layer.

    Raises:
        ConversionError: a kind of scaling, or a setting of one, that is not known here.
    """
    said: dict[str, Any] = {
        "rope_theta": fields.number("rope_theta", theta),
        "partial_rotary_factor": fields.number("partial_rotary_factor", factor),
    }
    nested = fields.mapping("rope_parameters", {})
    said |= fields.mapping("rope_scaling", {}) | _entry(nested, layer_type)
    return rope_of(said, interleaved=interleaved, context=fields.config.get("max_position_embeddings"))


def rope_of(said: Mapping[str, Any], *, interleaved: bool = False, context: int | None = None) -> Rope:
    """The rope that HF's `rope_parameters` describe; `context` stands in for an absent original length."""
    values = {_OLD_NAMES.get(key, key): value for key, value in said.items() if value is not None}
    kind = values.pop("rope_type", "default")
    if kind != "default":
        raise ConversionError(f"rope_scaling: rope_type {kind!r} is not known here")
    unknown = set(values) - {"theta", "partial_rotary_factor"}
    if unknown:
        raise ConversionError(f"rope_scaling: {sorted(unknown)[0]} is not known here")
    return Rope(interleaved=interleaved, **values)


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` that say this rope."""
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.partial_rotary_factor != 1.0:
        written["partial_rotary_factor"] = rope.partial_rotary_factor
    return written


def _entry(nested: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """The entry for one kind of layer, or the whole where there is one for all."""
    if nested and all(isinstance(value, Mapping) or value is None for value in nested.values()):
        return dict(nested.get(layer_type) or {})
    return dict(nested)
