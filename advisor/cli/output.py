"""Where words go: answers to stdout, progress and errors to stderr, files whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
"""Columns where nobody says otherwise: a pipe, a log."""


def console(*, error: bool = False) -> Console:
    """A rich console on stdout or stderr; 100 columns when nobody watches. NO_COLOR and COLUMNS are honoured."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout; no NaN, no infinity."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fail(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write("archcompass: " + " ".join(message.split()) + "\n")


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Any]:
    """A progress bar on stderr. Yields `update(share_done, what)`, which may be called as often as one likes."""
    if quiet:
        yield lambda _share, _what="": None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[what]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console(error=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0, what="")

        def update(share: float, what: str = "") -> None:
            bar.update(task, completed=min(max(share, 0.0), 1.0), what=what)

        yield update
