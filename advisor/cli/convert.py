"""`convert` and `verify`: a model in HF's terms and in ours, and whether the model is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, Model
from archcompass.advisor.cli.output import console, print_json, progress


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="config.json, its folder, a model's YAML, a published name, or a hub id."),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="model.yaml, config.json, or a folder for config.json.")
    ],
    model_type: Annotated[
        str | None,
        typer.Option("--model-type", help="HF model type to write; else the one it came from.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """HF config.json to our YAML, and back; nothing is dropped in silence.

    What one side cannot say is refused by name.

    Example: archcompass convert config.json model.yaml
    """
    from archcompass.blocks.hf import to_config
    from archcompass.blocks.model.files import load, make_folder, to_yaml, write_text

    spec = load(source)
    if target.suffix in (".yaml", ".yml"):
        write_text(target, to_yaml(spec))
    else:
        config = to_config(spec, model_type)
        target = target if target.suffix == ".json" else target / "config.json"
        make_folder(target.parent)
        write_text(target, json.dumps(config, indent=2) + "\n")
    done = {"source": source, "written": str(target), "name": spec.name, "parameters": spec.parameters().total}
    if as_json:
        print_json(done)
    else:
        console().print(f" {target} written: {spec.name}, {done['parameters']:,} parameters", markup=False)


@app.command()
def verify(
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Round trip, parameters, FLOPs, state, decode equals forward; exit 1 on a difference.

    What is too large for this machine is checked at reduced depth and width, and the answer says so.

    Example: archcompass verify jamba-v0.1
    """
    from archcompass.blocks.model.files import load
    from archcompass.profiles.verify import verify as run

    spec = load(model)
    with progress(f"verifying {spec.name}", quiet=as_json) as update:
        report = run(spec, progress=update)
    if as_json:
        print_json(report.as_data())
    else:
        from rich.markup import escape

        out = console()
        for check in report.checks:
            mark = "[green]same[/]" if check.passed else "[bold red]differs[/]"
            out.print(f" {mark:<16} [bold]{check.name}[/]  {escape(check.detail)}")
        out.print(f"\n {escape(spec.name)}: {'everything agrees' if report.passed else 'see the differences above'}")
    if not report.passed:
        raise typer.Exit(1)
