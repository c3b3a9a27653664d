"""`compare`: the four families at one budget over a sweep, with the crossings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, AsMarkdown, WorkloadFile, read_workload, with_workload_flags
from archcompass.advisor.cli.output import print_json
from archcompass.errors import InputError


@app.command()
@with_workload_flags
def compare(
    flags: dict[str, Any],
    workload_file: WorkloadFile = None,
    sweep: Annotated[str, typer.Option("--sweep", help="What grows along the rows: context or batch.")] = "context",
    values: Annotated[
        str | None, typer.Option("--values", help="Places to look at, with commas: 4k,32k,256k.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """The four families at one budget over a sweep of context or batch, with the crossover points.

    Example: archcompass compare --gpu "RTX 4090" --sweep context
    """
    from archcompass.advisor import units
    from archcompass.advisor.compare import compare as run
    from archcompass.advisor.report.compare import show

    if sweep not in ("context", "batch"):
        raise InputError(f"--sweep is {sweep!r}; choose context or batch")
    places = [units.tokens(part) for part in values.split(",")] if values else None
    result = run(read_workload(workload_file, flags), sweep, places)  # type: ignore[arg-type]
    data = result.model_dump(mode="json")
    if as_json:
        print_json(data)
    else:
        show(data, markdown=markdown)
