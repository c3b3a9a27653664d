"""Words in columns, on textwrap alone: an answer of one screen must not wait for a terminal library to load.

A `Cell` is text with a style; a row of cells is wrapped column by column. Everything passes `plain`, so that no name that
somebody gave can move the terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

from typer import style

from archcompass.advisor.cli.output import WIDTH, plain


class Cell(NamedTuple):
    """A text and how it looks."""

    text: str
    bold: bool = False
    dim: bool = False


class Column(NamedTuple):
    """Where a column's words go: its width in characters, at which side, and the space that follows."""

    width: int
    right: bool = False
    gap: int = 0


def width() -> int:
    """Columns of the screen; 100 when nobody watches. COLUMNS is honoured."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size((WIDTH, 24)).columns
    return WIDTH


def is_coloured() -> bool:
    """Whether stdout shows styles, and nobody has asked for none (NO_COLOR, https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def row(cells: Sequence[Cell], columns: Sequence[Column]) -> list[str]:
    """The lines of one row: each cell wrapped in its column, styled, with nothing at the end of a line."""
    wrapped = [wrap(cell.text, column.width) for cell, column in zip(cells, columns, strict=True)]
    return [_line(texts, cells, columns) for texts in zip_longest(*wrapped, fillvalue="")]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int], gap: int = 2) -> list[str]:
    """Lines of a table whose cells stay whole; columns whose index is in `right` end at the same place."""
    widths = [max(map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    columns = [Column(wide, right=index in right, gap=gap) for index, wide in enumerate(widths)]
    heads = row([Cell(heading, dim=True) for heading in headings], columns)
    return [*heads, *(line for cells in rows for line in row([Cell(cell) for cell in cells], columns))]


def _line(texts: Sequence[str], cells: Sequence[Cell], columns: Sequence[Column]) -> str:
    line, blank = "", 0
    for text, cell, column in zip(texts, cells, columns, strict=True):
        space = column.width - len(text)
        if text:
            line += " " * (blank + space * column.right) + styled(cell._replace(text=text))
            blank = 0
        blank += space * (not (column.right and text)) + column.gap
    return line


def wrap(text: str, columns: int) -> list[str]:
    """`text` in lines of at most so many characters; at least one line."""
    clean = plain(text)
    if len(clean) <= columns:
        return [clean]
    return textwrap.wrap(clean, max(columns, 1), break_on_hyphens=False) or [""]


def styled(cell: Cell) -> str:
    """The text with its style, where styles are shown."""
    plainly = plain(cell.text)
    if not (cell.bold or cell.dim) or not is_coloured():
        return plainly
    return style(plainly, bold=cell.bold or None, dim=cell.dim or None)


def write(lines: Iterable[str]) -> None:
    """Lines on stdout, as `row` and `styled` made them."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
