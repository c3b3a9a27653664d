"""Rows of data as a table: for the terminal, or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from archcompass.advisor import units
from archcompass.advisor.cli.output import console, plain, print_lines

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
        return f"{value / 1e9:,.1f}".removesuffix(".0") + " GB/s"
    if "bytes" in key or key.startswith("memory.detail."):
        return units.say_bytes(value) if value else "0"
    if key.startswith("flops."):
        return f"{value / 1e12:,.1f} TFLOP/s"
    if key.endswith(".flops"):
        return f"{units.say_figures(value)} FLOPs"
    if key.endswith(("tokens_per_second", "per_user")):
        return units.say_rate(value)
    if re.search(r"[._]ms\b|[._]ms_", key):
        return units.say_ms(value)
    if key.split(".")[0] in ("parameters", "published") or key.endswith("parameters"):
        return units.say_figures(value)
    if isinstance(value, int):
        return str(value) if key.endswith("year") else f"{value:,}"
    return f"{value:,.4g}"


def show_table(rows: Sequence[Row], columns: Mapping[str, str], *, markdown: bool = False) -> None:
    """Prints `rows` on stdout; `columns` maps a heading to the dotted key it shows."""
    cells = [[shown(key, flatten(row).get(key)) for key in columns.values()] for row in rows]
    if markdown:
        print_lines(markdown_lines(list(columns), cells))
        return
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=True, padding=(0, 2, 0, 0), header_style="dim")
    widths = _widths(list(columns), cells, out.width)
    for index, (heading, width) in enumerate(zip(columns, widths, strict=True)):
        if width:
            right = all(_is_numeric(row[index]) for row in cells)
            table.add_column(
                heading, justify="right" if right else "left", width=width, overflow="ellipsis", no_wrap=True
            )
    for row in cells:
        table.add_row(*(_literal(cell) for cell, width in zip(row, widths, strict=True) if width))
    out.print(table)


def _widths(headings: list[str], cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """Each column's width; the last takes what is left, and goes (0) where that is less than twelve characters."""
    whole = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    left = room - sum(width + 2 for width in whole[:-1]) - 2
    return [*whole[:-1], min(left, whole[-1]) if left >= 12 else 0]


def _literal(cell: str) -> Any:
    """Text as it is: square brackets in a source are no markup."""
    from rich.text import Text

    return Text(plain(cell))


def markdown_lines(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A pipe table, cells escaped."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(" --- " for _ in headings) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _is_numeric(cell: str) -> bool:
    return cell == "-" or cell[:1].isdigit()
