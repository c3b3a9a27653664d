"""Rows of data as a table: for the terminal, or as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from archcompass.advisor.cli.output import console
from archcompass.advisor.report import units

Row = Mapping[str, Any]


def flatten(data: Row, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def shown(key: str, value: Any) -> str:
    """A value as its key's unit asks."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(key, value)
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value) or "-"
    return str(value)


def _number(key: str, value: float) -> str:
    if "bytes_per_second" in key:
        return f"{units.gb(value)}/s"
    if "bytes" in key:
        return units.gb(value) if value else "0"
    if key.startswith("flops") or ".flops" in key:
        return f"{value / 1e12:,.1f} TFLOP/s"
    if key.endswith(("_ms", ".ms")) or "_ms_" in key:
        return units.duration(value)
    if key.split(".")[0] in ("parameters", "published") or key.endswith("parameters"):
        return units.count(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def show_table(rows: Sequence[Row], columns: Mapping[str, str], *, markdown: bool = False) -> None:
    """Prints `rows` on stdout; `columns` maps a heading to the dotted key it shows."""
    cells = [[shown(key, flatten(row).get(key)) for key in columns.values()] for row in rows]
    if markdown:
        sys.stdout.write("\n".join(markdown_lines(list(columns), cells)) + "\n")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=True, padding=(0, 2, 0, 0), header_style="dim")
    numeric = [all(_is_numeric(row[i]) for row in cells) for i in range(len(columns))]
    for heading, right in zip(columns, numeric, strict=True):
        table.add_column(heading, justify="right" if right else "left", overflow="ellipsis", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console().print(table)


def markdown_lines(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A pipe table, cells escaped."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(" --- " for _ in headings) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _is_numeric(cell: str) -> bool:
    return cell == "-" or cell[:1].isdigit()
