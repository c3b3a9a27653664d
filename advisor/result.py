"""Results as frozen records that can say themselves as JSON data.

Plain dataclasses and named tuples, not pydantic models: nothing here comes from outside, so nothing needs validating, and the
schemas of large nested answers would take longer to build than the answer takes to find. The small ones are named tuples for
the same reason: a dataclass takes seven times as long to come into being, and the first answer waits for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel


class Result:
    """Base of a result: a frozen, keyword-only dataclass."""

    def model_dump(self, *, mode: str = "json") -> dict[str, Any]:
        """The record as plain data, ready for JSON; `mode` is there for readers who know it from pydantic."""
        del mode
        return {name: plain(getattr(self, name)) for name in _names(type(self))}


def plain(value: Any) -> Any:
    """A value as JSON knows it: records and models as mappings, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(part) for key, part in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value


def _names(kind: type) -> list[str]:
    return [part.name for part in fields(kind)]
