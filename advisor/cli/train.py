"""`train`: a short honest training run of a model, or of a smaller one made of the same layers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, Model, option
from archcompass.advisor.cli.output import print_json, progress
from archcompass.errors import StoppedError

if TYPE_CHECKING:
    from archcompass.blocks.model.spec import ModelSpec
    from archcompass.profiles.training.plan import Plan, TrainingReport


@app.command()
def train(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="Text; of .jsonl the texts under 'text'.", show_default=False)],
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps in all.")] = 100,
    scale: Annotated[
        str | None, option("--scale", "Train the same design at so many parameters: 300k, 1M. Each layer kind stays.")
    ] = None,
    layers: Annotated[str | None, option("--layers", "Another pattern of the same blocks: '2*(mamba mlp)'.")] = None,
    batch: Annotated[int | None, option("--batch", "Sequences per step [8].")] = None,
    sequence: Annotated[int | None, option("--sequence", "Tokens per sequence [256].")] = None,
    learning_rate: Annotated[float | None, option("--learning-rate", "The highest, after warm-up [0.001].")] = None,
    warmup: Annotated[int | None, option("--warmup", "Steps of warm-up \\[a tenth].")] = None,
    seed: Annotated[int | None, option("--seed", "Of weights and order of the data [0].")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    precision: Annotated[str | None, option("--precision", "fp32 or bf16 \\[fp32 on cpu, bf16 on cuda].")] = None,
    tokenizer: Annotated[Path | None, option("--tokenizer", "A tokenizer.json; else a token is a byte.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for checkpoints.", show_default=False)] = None,
    keep_every: Annotated[int | None, option("--keep-every", "Steps between checkpoints \\[a tenth].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the folder's last checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """A short honest training run: loss curve, held-out loss, tokens/s, memory, checkpoints.

    AdamW, warm-up and cosine. Ctrl-C ends it after the step at hand, with a checkpoint; the same command with --resume goes on
    as if it had never stopped. Started by torchrun it shares each batch among the processes.

    Examples:

        archcompass train jamba-v0.1 --scale 300k --data README.md --steps 50

        archcompass train out/model.yaml --data corpus.jsonl --steps 2000 --device cuda -o run/
    """
    from archcompass.blocks.model.files import load
    from archcompass.profiles.training.plan import Plan

    plan = Plan.asked(
        steps=steps,
        batch=batch,
        sequence=sequence,
        learning_rate=learning_rate,
        warmup=warmup,
        seed=seed,
        keep_every=keep_every,
        precision=precision or ("bf16" if device.startswith("cuda") else "fp32"),
    )
    design = load(model)
    spec = design if layers is None else design.with_layers(layers)
    spec = spec if scale is None else _scaled(spec, scale, is_bytes=tokenizer is None)
    whole = design.parameters().total if spec != design else None
    places = {"device": device, "tokenizer": tokenizer, "folder": out}
    report, was_stopped = _run(spec, data, plan, quiet=as_json, resume=resume, reduced_from=whole, **places)
    _tell(report, as_json=as_json)
    if was_stopped:
        kept = f"{report.checkpoint} is kept; --resume goes on" if report.checkpoint else "nothing is kept (no -o)"
        raise StoppedError(f"stopped after step {report.steps}: {kept}")


def _run(spec: ModelSpec, data: Path, plan: Plan, *, quiet: bool, **how: Any) -> tuple[TrainingReport, bool]:
    """The run under a progress bar, and whether Ctrl-C ended it."""
    from archcompass.profiles.training.run import train as run

    with progress(f"training {spec.name}", quiet=quiet) as update, _interrupts() as stopped:
        return run(spec, data, plan, progress=update, stopped=stopped, **how), stopped()


def _tell(report: TrainingReport, *, as_json: bool) -> None:
    """The report, by the first process of those that torchrun started."""
    from archcompass.advisor.report.training import show

    if os.environ.get("RANK", "0") == "0":
        told = report.model_dump(mode="json")
        print_json(told) if as_json else show(told)


def _scaled(spec: ModelSpec, text: str, *, is_bytes: bool) -> ModelSpec:
    from archcompass.advisor.units import parameters
    from archcompass.profiles.training.data import BYTES
    from archcompass.profiles.training.reduce import reduced

    return reduced(spec, parameters(text, "--scale"), vocab_size=BYTES if is_bytes else None)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the run to end after its step; a second one ends it at once."""
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
