"""Between config.json and `ModelSpec`: finds the family, reads, writes, and checks what was written by reading it back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from archcompass.blocks.base import explain
from archcompass.blocks.hf import hub
from archcompass.blocks.hf.compare import differences
from archcompass.blocks.hf.family import Family
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.model.files import read_text
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import ConversionError, FileFormatError, InputError, SpecError, nearest

_PREFERRED = ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe")
"""Families tried first for a model that does not say its own; the rest follow by name."""

_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""A model does not know its tokenizer's special tokens; unsaid, transformers would assume some, beyond a small vocabulary."""


@cache
def model_types() -> tuple[str, ...]:
    """Every `model_type` that can be read."""
    here = Path(__file__).parent / "families"
    found = [path.stem for path in here.glob("*.py") if path.stem != "__init__"]
    return (*(name for name in _PREFERRED if name in found), *sorted(set(found) - set(_PREFERRED)))


@cache
def family(model_type: str) -> Family:
    """The family called `model_type`; imports only its file.

    Raises:
        ConversionError: no adapter reads it.
    """
    if model_type not in model_types():
        close = nearest(model_type, model_types())
        hint = f"; nearest: {', '.join(close)}" if close else f"; known: {', '.join(model_types())}"
        raise ConversionError(f"model_type {model_type!r} has no adapter{hint}")
    found: Family = import_module(f"archcompass.blocks.hf.families.{model_type}").FAMILY
    return found


def load_config(path: str | Path) -> ModelSpec:
    """The model of a config.json, given as the file or its folder.

    Raises:
        FileFormatError: no such file, or no JSON object.
        ConversionError: it says something this package cannot; names the field.
    """
    file, config = read_json(path)
    spec = read_config(config)
    folder = file.resolve().parent.name
    return spec.model_copy(update={"name": name_of(folder if file.name == "config.json" and folder else file.stem)})


def load_hub(name: str) -> ModelSpec:
    """The model of the config.json that the hub keeps under an id such as "org/name".

    Raises:
        UnknownNameError, FileFormatError: no id, or nothing can be fetched under it; says why.
        ConversionError: the configuration says something this package cannot; names the field.
    """
    if not hub.is_id(name):
        raise FileFormatError(f"{name} is no file or folder here, and no hub id such as org/name")
    return load_config(hub.config_path(name)).model_copy(update={"name": name.rpartition("/")[2]})


def name_of(text: str) -> str:
    """A model's name from that of its file or folder, which may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:200]


def read_json(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file that was meant and its content.

    Raises:
        FileFormatError: no such file, or no JSON object.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{file.name} holds a {type(config).__name__}; a configuration is a mapping")
    return file, config


def read_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a configuration's keys describe.

    Raises:
        ConversionError: no `model_type`, one without an adapter, or a field that cannot be said here.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConversionError("model_type is missing; a Hugging Face config.json names its family there")
    chosen = family(model_type)
    fields = Fields(_special_floats(config), chosen.no_effect, chosen.aliases)
    try:
        spec = chosen.read(fields)
    except ConversionError:
        raise
    except ValidationError as error:
        raise ConversionError(f"this {model_type} configuration describes no model: {explain(error)}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ConversionError(
            f"this {model_type} configuration describes no model: {_plain(error)} (after reading {fields.asked})"
        ) from error
    fields.finish()
    return spec


def to_config(spec: ModelSpec, model_type: str | None = None) -> dict[str, Any]:
    """The config.json that says this model, as plain data.

    Args:
        spec: the model.
        model_type: the family to write; None takes the model's own, else the first that can say it.

    Raises:
        ConversionError: the family (or, without one, no family) can say it; names the field that is lost.
    """
    wanted = model_type or spec.model_type
    if wanted is not None:
        return _written(spec, family(wanted))
    tried: list[ConversionError] = []
    for name in model_types():
        try:
            return _written(spec, family(name))
        except ConversionError as error:
            tried.append(error)
    nearest_one = min(tried, key=lambda error: error.distance if isinstance(error, _LostError) else _FAR)
    raise ConversionError(f"no Hugging Face family can say this model; the nearest: {nearest_one}")


class _LostError(ConversionError):
    """A family that says another model.

    Args:
        chosen: the family.
        lost: every difference, worded.
        missing: how many kinds of our blocks the family's model lacks.
    """

    def __init__(self, chosen: Family, lost: list[str], missing: int) -> None:
        self.distance = (missing, len(lost))
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        super().__init__(f"{chosen.model_type} cannot say this model: {lost[0]}{more}")


_FAR = (10**6, 0)
"""Farther than any model that a family says: one it has no words for."""


def _written(spec: ModelSpec, chosen: Family) -> dict[str, Any]:
    head = {"architectures": [chosen.architecture], "model_type": chosen.model_type, **_NO_TOKENS}
    try:
        config = {**head, **chosen.write(spec)}
        back = read_config(config)
    except ConversionError as error:
        raise ConversionError(f"{chosen.model_type} cannot say this model: {error}") from error
    except (SpecError, AttributeError, KeyError, IndexError, ValueError) as error:
        raise ConversionError(f"{chosen.model_type} cannot say this model: {_plain(error)}") from error
    if lost := differences(spec, back):
        raise _LostError(chosen, lost, len(_kinds(spec) - _kinds(back)))
    return {key: _finite(value) for key, value in config.items()}


def _kinds(spec: ModelSpec) -> set[str]:
    return {block.kind for block in spec.blocks.values()}


def _special_floats(value: Any) -> Any:
    """transformers writes infinity, which JSON lacks, as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(str(value["__float__"]).replace("Infinity", "inf"))
        return {key: _special_floats(entry) for key, entry in value.items()}
    return [_special_floats(entry) for entry in value] if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    """The same on the way out."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
