"""JSON Schema of a model's YAML, for editors: the fields of every registered block, those of other packages included.

What a schema cannot say (heads that divide, patterns that name blocks) is said when the file is read.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from archcompass.blocks.base import known_blocks
from archcompass.blocks.model.files import VERSION
from archcompass.blocks.model.spec import ModelSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """The schema of a whole file."""
    blocks = list(known_blocks().values())
    models: list[tuple[type[BaseModel], Literal["validation"]]] = [(ModelSpec, "validation")]
    names, made = models_json_schema([*models, *((block, "validation") for block in blocks)])
    definitions = made["$defs"]
    for block in blocks:
        # `kind` has a default in Python; in a file it says which block is meant.
        definition = definitions[_name(names[block, "validation"])]
        definition["required"] = sorted({"kind", *definition.get("required", [])})
    definitions["Block"] = {
        "description": "Any block, by its kind.",
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": sorted(known_blocks())}},
        "oneOf": [names[block, "validation"] for block in blocks],
    }
    model = definitions.pop(_name(names[ModelSpec, "validation"]))
    model["properties"] = {"archcompass": {"const": VERSION, "title": "File version"}, **model["properties"]}
    model["required"] = ["archcompass", *model["required"]]
    return {"$schema": DIALECT, "title": "archcompass model", **_without_title(model), "$defs": definitions}


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _without_title(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "title"}
