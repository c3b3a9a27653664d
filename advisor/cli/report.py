"""`report` and `diff`: a saved answer as a page, and what changed between two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, AsMarkdown
from archcompass.advisor.cli.output import console, print_json
from archcompass.errors import FileFormatError, InputError

Saved = Annotated[Path, typer.Argument(metavar="REPORT.json", help="report.json of `advise`.")]


@app.command()
def report(
    saved: Saved,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page; report.html beside the file if not given.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A saved report.json as one self-contained HTML page.

    Example: archcompass report out/report.json
    """
    from archcompass.advisor.report.html import page
    from archcompass.blocks.model.files import write_text

    target = out or saved.with_suffix(".html")
    with understood(saved):
        text = page(read(saved), f"archcompass report {saved}", str(saved.parent))
    write_text(target, text)
    if as_json:
        return print_json({"written": str(target), "bytes": len(text.encode())})
    return console(error=True).print(f" Written: {target}", markup=False, highlight=False)


@app.command()
def diff(
    before: Annotated[
        Path, typer.Argument(metavar="A.json", help="A report.json, or what `recommend --json` printed.")
    ],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Another.")],
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """What changed between two answers, for a pull request. Exit 1 when something did.

    Example: archcompass diff before/report.json after/report.json --markdown
    """
    from archcompass.advisor.diff import changes
    from archcompass.advisor.report.tables import show_table, shown

    with understood(before, after):
        found = changes(answer_of(read(before)), answer_of(read(after)))
    if as_json:
        print_json(found)
    elif found:
        told = [row | {side: shown(row["what"], row[side]) for side in ("before", "after")} for row in found]
        columns = {"what": "what", str(before): "before", str(after): "after", "change": "change"}
        show_table(told, columns, markdown=markdown)
    else:
        console().print(" Nothing that a reader would see has changed.")
    if found:
        raise typer.Exit(1)


def read(path: Path) -> dict[str, Any]:
    """A saved report.

    Raises:
        FileFormatError: not a report of ours.
    """
    from archcompass.blocks.model.files import read_text

    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(data, dict) or not {"recommendation", "candidates"} & set(data):
        raise FileFormatError(f"{path.name} is no report: it has neither a recommendation nor candidates")
    return data


@contextmanager
def understood(*saved: Path) -> Iterator[None]:
    """Whoever wrote the files may have left out or changed anything.

    Raises:
        FileFormatError: they lack what is asked of them.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        names = " and ".join(path.name for path in saved)
        told = f"{type(error).__name__} {error}"[:80]
        raise FileFormatError(f"{names}: no report.json that `advise -o` of this version wrote ({told})") from error


def answer_of(data: dict[str, Any]) -> dict[str, Any]:
    """The recommendation inside a report, or the recommendation itself."""
    found: dict[str, Any] = data.get("recommendation", data)
    return found
