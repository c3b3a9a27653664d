"""What each chart of the page shows, as a table: for readers who do not see it, and for all who want the figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from archcompass.advisor import units
from archcompass.advisor.report import facts
from archcompass.advisor.report.figures import MEMORY_PARTS
from archcompass.advisor.sizing.shapes import FAMILIES

Data = dict[str, Any]

Table = list[list[str]]
"""Rows of cells, the heading first."""


def memory(answer: Data) -> Table:
    """A row a family: what its memory is made of."""
    candidates = answer["candidates"]
    parts = {key: label for key, (label, _) in MEMORY_PARTS.items() if any(c["memory"][key] for c in candidates)}
    rows = [
        [
            candidate["family"],
            *(units.say_bytes(candidate["memory"][key]) for key in parts),
            units.say_bytes(candidate["memory"]["total_bytes"]),
            facts.verdict(candidate),
        ]
        for candidate in candidates
    ]
    return [["family", *parts.values(), "together", "fits"], *rows]


def sweep(comparison: Data, key: str, say: Callable[[float], str]) -> Table:
    """A row a place of the sweep, a column a family; a dash where it does not fit."""
    places = list(dict.fromkeys(point[comparison["sweep"]] for point in comparison["points"]))
    found = {(point[comparison["sweep"]], point["family"]): point[key] for point in comparison["points"]}
    rows = [
        [
            units.say_tokens(place),
            *(say(value) if (value := found.get((place, family))) else "-" for family in FAMILIES),
        ]
        for place in places
    ]
    return [[comparison["sweep"], *FAMILIES], *rows]


def roofline(found: Data) -> Table:
    """A row an operation, the longest first."""
    rows = [
        [point["phase"], point["name"], f"{point['flops_per_byte']:.3g}", f"{point['share']:.1%}", point["bound"]]
        for point in sorted(found["points"], key=lambda point: (point["phase"], -point["share"]))
    ]
    return [["phase", "operation", "FLOPs per byte", "share of its phase", "bound by"], *rows]


def decision_map(found: Data) -> Table:
    """The cells of the map, which family comes first."""
    rows = [
        [row, *(cell or "nothing fits" for cell in cells)]
        for row, cells in zip(found["rows"], found["cells"], strict=True)
    ]
    return [[f"{found['down']} / {found['across']}", *map(units.say_tokens, found["columns"])], *rows]
