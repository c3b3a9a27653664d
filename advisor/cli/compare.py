"""`compare`: the four families at one budget over a sweep, with the crossings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, AsMarkdown, WorkloadFile, read_workload, whole, with_workload_flags
from archcompass.advisor.cli.output import console, print_json, progress
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
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Build the four small, time them on this machine, over what was predicted."),
    ] = False,
    device: Annotated[str, typer.Option("--device", help="With --measure: cpu or cuda.")] = "cpu",
    seconds: Annotated[
        float, typer.Option("--seconds", help="With --measure: about how long it may take.", min=1, max=3600)
    ] = 60.0,
    scale: Annotated[str, typer.Option("--scale", help="With --measure: parameters of each model.")] = "20M",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write the picture: an HTML file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """The four families at one budget over a sweep of context or batch, with the crossover points.

    Examples:

        archcompass compare --gpu "RTX 4090" --sweep context

        archcompass compare --measure -o out/compare.html
    """
    from archcompass.advisor import units
    from archcompass.advisor.compare import compare as run
    from archcompass.advisor.compare import compare_here
    from archcompass.advisor.report.compare import show, write_page

    if sweep not in ("context", "batch"):
        raise InputError(f"--sweep is {sweep!r}; choose context or batch")
    places = [whole("values", part) for part in values.split(",")] if values else None
    workload = read_workload(workload_file, flags)
    if measure:
        with progress("measuring the four families", quiet=as_json) as update:
            result = compare_here(
                workload,
                sweep,  # type: ignore[arg-type]
                places,
                device=device,
                seconds=seconds,
                parameters=units.parameters(scale, "--scale"),
                progress=update,
            )
    else:
        result = run(workload, sweep, places)  # type: ignore[arg-type]
    data = result.model_dump(mode="json")
    if as_json:
        print_json(data)
    else:
        show(data, markdown=markdown)
    if out is not None:
        write_page(data, out)
        console(error=True).print(f" Wrote {out}", markup=False)
