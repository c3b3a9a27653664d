"""`recommend`: rules, sizing and prediction for all four families, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import (
    AsJson,
    AsMarkdown,
    BytesPerToken,
    Effort,
    SampleFile,
    Tokenizer,
    WorkloadFile,
    read_sample,
    read_workload,
    spoken,
    with_workload_flags,
)
from archcompass.advisor.cli.output import print_json
from archcompass.advisor.workload import Workload
from archcompass.errors import DoesNotFitError

if TYPE_CHECKING:
    from archcompass.advisor.sample import Sample


@app.command()
@with_workload_flags
def recommend(
    flags: dict[str, Any],
    workload_file: WorkloadFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="The arithmetic behind every rule, with sources.")] = False,
    effort: Effort = "normal",
    sample: SampleFile = None,
    bytes_per_token: BytesPerToken = 4.0,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """Which family fits, why, and what would change the answer; all four sized for your card.

    Examples:

        archcompass recommend examples/chat-bot.yaml

        archcompass recommend --context 128k --breadth broad --recall exact --gpu "RTX 4090"

        archcompass recommend --sample documents.jsonl --gpu "2x L40S" --effort high
    """
    measured = read_sample(sample, bytes_per_token, tokenizer)
    workload = read_workload(workload_file, (measured.keys if measured else {}) | flags)
    question = spoken(workload_file, (measured.keys if measured else {}) | flags)
    recommend_on(
        workload,
        as_json=as_json,
        markdown=markdown,
        explain=explain,
        question=question,
        effort=effort,
        sample=measured,
    )


def recommend_on(
    workload: Workload,
    *,
    as_json: bool = False,
    markdown: bool = False,
    explain: bool = False,
    question: str = "",
    out: Path | None = None,
    effort: Literal["normal", "high"] = "normal",
    sample: Sample | None = None,
) -> None:
    """Answers `workload` on stdout, and keeps it in `out` when that is given; says what was measured of `sample`.

    `question` is what was typed for it, as the commands to type next repeat it.

    Raises:
        DoesNotFitError: nothing fits; says what would.
    """
    from archcompass.advisor.recommend import recommend as run

    answer = run(workload, effort=effort)
    if out is not None:
        from archcompass.advisor.advise import write_all

        write_all(out, {"workload.yaml": workload.to_yaml()})
    data = answer.model_dump(mode="json")
    if sample is not None:
        data |= {"sample": sample.model_dump(mode="json"), "notes": [sample.said, *data["notes"]]}
    if as_json:
        print_json(data)
    elif answer.refusal is None:
        from archcompass.advisor.report.terminal import show

        show(data, question=question, markdown=markdown, explain=explain)
    if answer.refusal is not None:
        raise DoesNotFitError(answer.refusal)
