"""Where words go: answers to stdout, progress and errors to stderr.

What a file or a folder is called may hold anything, escape sequences of a terminal included. Nothing that cannot be printed
leaves through here.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import category

from archcompass.errors import StoppedError

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
"""Columns where nobody says otherwise: a pipe, a log."""


def plain(text: str) -> str:
    """`text` with every character that a terminal would obey, or cannot show, written as JSON writes it."""
    if text.isprintable():
        return text
    return "".join(one if one in "\n\t" or category(one) not in _UNPRINTABLE else json.dumps(one)[1:-1] for one in text)


_UNPRINTABLE = frozenset(("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))
"""Unicode's controls, format characters (the direction of text), half characters, what has no meaning (yet, or to others), line
separators."""


def console(*, error: bool = False) -> Console:
    """A rich console on stdout or stderr; 100 columns when nobody watches. NO_COLOR and COLUMNS are honoured."""
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        """Styles are its own; of the words it was given it passes on those that can be printed."""

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(plain(segment.text), segment.style)

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return PlainConsole(file=stream, width=width, highlight=False, soft_wrap=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout; no NaN, no infinity. What cannot be printed is escaped, which JSON reads back."""
    sys.stdout.write(plain(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)) + "\n")


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout as they are: Markdown."""
    sys.stdout.write("".join(f"{plain(line)}\n" for line in lines))


def fail(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write("archcompass: " + plain(" ".join(message.split())) + "\n")


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Ctrl-C within says `what` is left."""
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; {what}") from None


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Any]:
    """A progress bar on stderr. Yields `update(share_done, what)`, which may be called as often as one likes."""
    gc.enable()
    if quiet:
        yield lambda _share, _what="": None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console(error=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0, what="")

        def update(share: float, what: str = "") -> None:
            bar.update(task, completed=min(max(share, 0.0), 1.0), what=what)

        yield update
