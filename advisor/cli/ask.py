"""`ask`: the questionnaire. Arrow keys in a terminal, numbered lines everywhere else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import (
    AsJson,
    BytesPerToken,
    SampleFile,
    Tokenizer,
    read_sample,
    spoken,
    with_workload_flags,
)
from archcompass.advisor.cli.output import console


@app.command()
@with_workload_flags
def ask(
    flags: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for workload.yaml and, with advise, the rest.", show_default=False),
    ] = None,
    only_recommend: Annotated[
        bool, typer.Option("--only-recommend", help="Stop after the recommendation; build and profile nothing.")
    ] = False,
    sample: SampleFile = None,
    bytes_per_token: BytesPerToken = 4.0,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """At most ten questions, then the answer.

    Every question has a default (Enter), a reason, and a way back (b). Flags answer questions beforehand, and so does a sample
    of your documents.

    Example: archcompass ask --gpu "RTX 4090" -o out/
    """
    from archcompass.advisor.cli.advise import advise_on
    from archcompass.advisor.cli.recommend import recommend_on
    from archcompass.advisor.questionnaire import Interview

    measured = read_sample(sample, bytes_per_token, tokenizer)
    if measured is not None:
        console(error=True).print(f" {measured.said}", markup=False)
    interview = Interview(start=(measured.keys if measured else {}) | flags)
    if sys.stdin.isatty() and sys.stderr.isatty():
        from archcompass.advisor.cli.screen import play
    else:
        from archcompass.advisor.cli.plain import play
    play(interview)
    workload = interview.workload
    if not as_json:
        _summary(workload.to_yaml())
    question = spoken(None, workload.given) if out is None else str(out / "workload.yaml")
    if only_recommend:
        return recommend_on(workload, as_json=as_json, question=question, out=out, sample=measured)
    return advise_on(workload, question, out=out, as_json=as_json)


def _summary(yaml: str) -> None:
    out = console(error=True)
    out.print("\n [bold]Your workload[/] [dim](keep it: archcompass advise workload.yaml)[/]")
    for line in yaml.strip().splitlines():
        out.print(f"   {line}", markup=False)
    out.print()
