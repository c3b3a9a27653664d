"""Published models: one short file of facts each, in `models/`. Names are the lower-cased names of the checkpoints.

A file holds what the lab says (`published`: total and active parameters, source, licence, a note where our count differs
and why) and the model itself in the terms of our blocks (`model`), as a model file would say it. Looking a name up reads
one file; listing the names reads none.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from archcompass.blocks.model.files import parse
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import UnknownNameError

_FOLDER = Path(__file__).parent / "models"


class Published(NamedTuple):
    """What the authors say.

    Attributes:
        total: parameters, as the card or the paper gives them (rounded as they round).
        active: parameters one token uses, in the lab's own convention (see `note` and `Parameters`).
    """

    total: int
    active: int


class Entry(NamedTuple):
    """One published model.

    Attributes:
        name: as users write it.
        spec: the model.
        published: the lab's figures.
        source: where figures and configuration come from.
        licence: of the weights; None where it is not known or no weights were published.
        note: what differs between the figures and the count, or is not confirmed; empty where nothing does.
        same_as: the entry of which this is another spelling, or None.
        precision: the format its weights are published in; more bits than these bring nothing.
    """

    name: str
    spec: ModelSpec
    published: Published
    source: str
    licence: str | None
    note: str
    same_as: str | None
    precision: str


@cache
def names() -> tuple[str, ...]:
    """Every published model's name, sorted."""
    return tuple(sorted(path.name.removesuffix(".json") for path in _FOLDER.glob("*.json")))


@cache
def entry(name: str) -> Entry:
    """All that is known about one published model.

    Raises:
        UnknownNameError: no model is called so; lists the nearest.
    """
    key = name.strip().lower()
    if key not in names():
        raise UnknownNameError("model", name, names())
    facts = _read(key)
    return Entry(
        name=key,
        spec=parse({"archcompass": 1, "name": key, **facts["model"]}, key),
        published=Published(total=facts["published"]["total"], active=facts["published"]["active"]),
        source=facts["source"],
        licence=facts.get("licence"),
        note=facts.get("note", ""),
        same_as=facts.get("same_as"),
        precision=facts.get("precision", "bf16"),
    )


@cache
def figures(name: str) -> Published:
    """What the authors of the model called `name` say of its size, without building it.

    Raises:
        UnknownNameError: no model is called so; lists the nearest.
    """
    key = name.strip().lower()
    if key not in names():
        raise UnknownNameError("model", name, names())
    facts = _read(key)["published"]
    return Published(total=facts["total"], active=facts["active"])


def published(name: str) -> ModelSpec:
    """The model called `name`.

    Raises:
        UnknownNameError: no model is called so; lists the nearest.
    """
    return entry(name).spec


def _read(name: str) -> dict[str, Any]:
    with open(f"{_FOLDER}/{name}.json", "rb") as file:
        facts: dict[str, Any] = json.load(file)
    return facts
