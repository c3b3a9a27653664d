"""Rotary positions in configurations: `rope_theta` and `rope_scaling` of old, `rope_parameters` of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from archcompass.blocks.base import explain
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.rope import Rope
from archcompass.errors import ConversionError

_OLD_NAMES = {"type": "rope_type"}

_RATIO_TYPES = ("yarn", "longrope")
"""Types whose factor, where it is not said, is the longest length over the original one."""


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
    assumed = {
        "rope_theta": fields.number("rope_theta", theta),
        "partial_rotary_factor": fields.number("partial_rotary_factor", factor),
        "original_max_position_embeddings": fields.integer("original_max_position_embeddings", None),
    }
    old, new = fields.mapping("rope_scaling", {}), _entry(fields.mapping("rope_parameters", {}), layer_type)
    said = {_OLD_NAMES.get(key, key): value for key, value in old.items()}
    for key, value in ((_OLD_NAMES.get(key, key), value) for key, value in new.items()):
        if value is not None and (said.get(key) or value) != value:
            fields.refuse("rope_scaling", f"{key}: {said[key]}", f"what rope_parameters says, which is {value!r}")
        said[key] = value
    return rope_of(assumed | said, interleaved=interleaved, longest=fields.config.get("max_position_embeddings"))


def rope_of(said: Mapping[str, Any], *, interleaved: bool = False, longest: int | None = None) -> Rope:
    """The rope that HF's `rope_parameters` describe; `longest` (max_position_embeddings) stands in for absent lengths."""
    names = {"rope_theta": "theta", **_OLD_NAMES}
    values = {names.get(key, key): value for key, value in said.items() if value is not None}
    kind = values.get("rope_type", "default")
    if kind == "dynamic":
        values["original_max_position_embeddings"] = longest
    elif kind not in ("default", "linear"):
        values.setdefault("original_max_position_embeddings", longest)
    else:
        values.pop("original_max_position_embeddings", None)
    if kind in _RATIO_TYPES and "factor" not in values and longest:
        values["factor"] = longest / values["original_max_position_embeddings"]
    try:
        return Rope.model_validate({**values, "interleaved": interleaved})
    except ValidationError as error:
        raise ConversionError(str(explain(error, "rope_scaling", Rope.model_fields))) from error


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` that say this rope."""
    said = rope.model_dump(mode="json", exclude_defaults=True, exclude={"theta", "interleaved"})
    if rope.rope_type == "dynamic":
        del said["original_max_position_embeddings"]
    return {"rope_theta": rope.theta, "rope_type": rope.rope_type, **said}


def _entry(nested: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """The entry for one kind of layer, or the whole where there is one for all."""
    if nested and all(isinstance(value, Mapping) or value is None for value in nested.values()):
        return dict(nested.get(layer_type) or {})
    return dict(nested)
