"""`export` and `schema`: a design for other tools, and the schema of its file for editors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, Model, option, whole
from archcompass.advisor.cli.output import console, print_json


@app.command()
def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if need be.")],
    to: Annotated[str, typer.Option("--to", help="hf, yaml, vllm or torchrun.")] = "hf",
    weights: Annotated[str | None, option("--weights", "random, or a checkpoint of `train`; else none.")] = None,
    dtype: Annotated[
        str | None, option("--dtype", "Of the weights: fp32 or bf16 \\[bf16; a checkpoint's fp32].")
    ] = None,
    model_type: Annotated[str | None, option("--model-type", "HF model type to write.")] = None,
    context: Annotated[str | None, option("--context", "vllm: tokens of one sequence at most: 32k.")] = None,
    concurrency: Annotated[str | None, option("--concurrency", "vllm: sequences at once at most.")] = None,
    gpu: Annotated[str | None, option("--gpu", "vllm, torchrun: the cards: '4x h100-sxm'.")] = None,
    data: Annotated[str, typer.Option("--data", help="torchrun: the text, as seen from DIR.")] = "corpus.txt",
    steps: Annotated[int, typer.Option("--steps", help="torchrun: optimizer steps.")] = 1000,
    batch: Annotated[int | None, option("--batch", "torchrun: sequences per step, over all cards [8].")] = None,
    sequence: Annotated[int | None, option("--sequence", "torchrun: tokens per sequence [256].")] = None,
    as_json: AsJson = False,
) -> None:
    """A design for other tools: an HF folder, YAML with its schema, or a launch recipe.

    hf opens in transformers; yaml completes in an editor; vllm is an HF folder with serve.sh; torchrun is the YAML with
    train.sh. What a target cannot say is refused by name.

    Examples:

        archcompass export out/model.yaml hf/ --weights random

        archcompass export jamba-v0.1 serve/ --to vllm --context 64k --gpu "2x h100-sxm"
    """
    from archcompass.advisor.export import export as run
    from archcompass.blocks.model.files import load
    from archcompass.errors import InputError
    from archcompass.profiles.hardware import find
    from archcompass.profiles.training.plan import Plan

    if dtype not in (None, "fp32", "bf16"):
        raise InputError(f"--dtype is {dtype!r}; choose fp32 or bf16")
    spec = load(model)
    written = run(
        spec,
        folder,
        to,
        weights=weights,
        dtype=dtype,  # type: ignore[arg-type]
        model_type=model_type,
        context=None if context is None else whole("context", context),
        sequences=None if concurrency is None else whole("concurrency", concurrency),
        hardware=None if gpu is None else find(gpu),
        plan=Plan.asked(steps=steps, batch=batch, sequence=sequence, precision="bf16"),
        data=data,
    )
    if as_json:
        print_json({"model": spec.name, "to": to, "written": [str(path) for path in written]})
        return
    for path in written:
        console().print(f" {path}", markup=False)


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file; stdout if not given.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The JSON Schema of a model's YAML, every registered block included.

    Example: archcompass schema -o model.schema.json
    """
    from archcompass.blocks.model.files import write_text
    from archcompass.blocks.model.schema import schema as made

    text = json.dumps(made(), indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
        return
    write_text(out, text)
    if as_json:
        print_json({"written": str(out), "bytes": len(text.encode())})
