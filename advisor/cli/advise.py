"""`advise`: recommend, build the pick on this machine, profile it, report and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import (
    AsJson,
    AsMarkdown,
    Effort,
    WorkloadFile,
    read_workload,
    spoken,
    with_workload_flags,
)
from archcompass.advisor.cli.output import console, keeping, print_json, progress
from archcompass.advisor.workload import Workload


@app.command()
@with_workload_flags
def advise(
    flags: dict[str, Any],
    workload_file: WorkloadFile = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for workload.yaml, model.yaml and report.json.", show_default=False),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="About how long measuring may take.", min=1, max=3600)
    ] = 40.0,
    effort: Effort = "normal",
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """Recommend, build the pick from real blocks on this machine, profile it, report and export.

    Example: archcompass advise examples/corporate-archive.yaml -o out/
    """
    workload = read_workload(workload_file, flags)
    question = spoken(workload_file, flags)
    advise_on(workload, question, out=out, as_json=as_json, markdown=markdown, seconds=seconds, effort=effort)


def advise_on(
    workload: Workload,
    question: str,
    *,
    out: Path | None = None,
    as_json: bool = False,
    markdown: bool = False,
    seconds: float = 40.0,
    effort: Literal["normal", "high"] = "normal",
) -> None:
    """Goes the whole way for `workload`; `question` is what was typed for it.

    Raises:
        DoesNotFitError: nothing fits; says what would.
    """
    from archcompass.advisor.advise import advise as run
    from archcompass.advisor.advise import write
    from archcompass.advisor.report.terminal import show
    from archcompass.blocks.model.files import check_folder

    if out is not None:
        check_folder(out)
    kept = "nothing was kept (no -o)" if out is None else f"{out} is as it was: its files are written at the end"
    with keeping(kept):
        with progress("advising") as update:
            advice = run(workload, seconds=seconds, progress=update, effort=effort, folder=out)
        data = advice.as_data()
        # The files first: whoever reads the answer may close the pipe at any line.
        written = [] if out is None else write(advice, out)
    if as_json:
        print_json(data)
    else:
        folder = "" if out is None else str(out)
        show(data["recommendation"], profile=data["profile"], folder=folder, question=question, markdown=markdown)
    if written:
        told = console(error=True)
        told.print(f" Written: {', '.join(str(path) for path in written)}", markup=False, highlight=False)
