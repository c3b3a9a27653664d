"""`profile`: memory and speed of one model, predicted for a card, measured on this machine, or both."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, AsMarkdown, Model
from archcompass.advisor.cli.output import print_json, progress


def _flag(name: str, help: str, metavar: str = "VALUE") -> Any:
    return typer.Option(name, help=help, metavar=metavar, show_default=False)


@app.command()
def profile(
    model: Model,
    gpu: Annotated[
        str | None, _flag("--gpu", "The card: 'RTX 4090', '2x h100-sxm', 'cpu', '24GB 1008GB/s 165TFLOPS'.")
    ] = None,
    vram: Annotated[str | None, _flag("--vram", "Memory of one card, instead of its own: 24GB, 24GiB.")] = None,
    bandwidth: Annotated[
        str | None, _flag("--bandwidth", "Bandwidth of one card's memory, instead of its own: 1008GB/s.")
    ] = None,
    tflops: Annotated[str | None, _flag("--tflops", "Dense bf16 TFLOP/s of one card, instead of its own.")] = None,
    device: Annotated[str | None, _flag("--device", "Measure on this machine: cpu or cuda.")] = None,
    batch: Annotated[str | None, _flag("--batch", "Sequences computed together [1].")] = None,
    prompt: Annotated[str | None, _flag("--prompt", "Tokens of each prompt [1024]: 4096, 100k.")] = None,
    generate: Annotated[str | None, _flag("--generate", "Tokens generated after it [256].")] = None,
    precision: Annotated[
        str | None, _flag("--precision", "Storage of the weights \\[bf16]: fp8, int4, q4_k_m ...")
    ] = None,
    kv_precision: Annotated[
        str | None, _flag("--kv-precision", "Storage of caches that grow \\[as the activations].")
    ] = None,
    mode: Annotated[str | None, _flag("--mode", "inference, finetuning or training \\[inference].")] = None,
    engine: Annotated[str | None, _flag("--engine", "native, transformers, vllm or llama.cpp \\[native].")] = None,
    parallel: Annotated[
        str | None, _flag("--parallel", "How several cards share it: tensor, data or pipeline \\[as the engine does].")
    ] = None,
    offload: Annotated[
        float | None, _flag("--offload", "Share of the routed experts that lies in system memory \\[0].")
    ] = None,
    optimizer: Annotated[str | None, _flag("--optimizer", "Training: adamw, adamw-8bit or sgd \\[adamw].")] = None,
    master_weights: Annotated[
        bool | None, typer.Option("--master-weights", help="Training: an fp32 copy of the weights too.")
    ] = None,
    recompute: Annotated[
        str | None, _flag("--recompute", "Training, activations made again: none, selective or full \\[none].")
    ] = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """Memory and speed of one model: predicted for a card, measured here, or both side by side.

    Examples:

        archcompass profile llama-3.1-8b --gpu "RTX 4090" --precision int4 --prompt 32k

        archcompass profile out/model.yaml --device cpu --prompt 512
    """
    from archcompass.advisor.report.profile import show
    from archcompass.blocks.model.files import load
    from archcompass.profiles.profile import profile as run

    asked: dict[str, Any] = {
        "gpu": gpu,
        "vram": vram,
        "bandwidth": bandwidth,
        "tflops": tflops,
        "device": device,
        "batch": whole("batch", batch),
        "prompt": whole("prompt", prompt),
        "generate": whole("generate", generate),
        "precision": precision,
        "kv_precision": kv_precision,
        "mode": mode,
        "engine": engine,
        "parallel": parallel,
        "offload": offload,
        "optimizer": optimizer,
        "master_weights": master_weights,
        "recompute": recompute,
    }
    spec = load(model)
    with progress("measuring", quiet=device is None) as update:
        report = run(
            spec, progress=update, called=model, **{key: value for key, value in asked.items() if value is not None}
        )
    data = report.model_dump(mode="json")
    if as_json:
        print_json(data)
    else:
        show(data, markdown=markdown)
    if not all(entry["fits"] for entry in data["profiles"]):
        raise typer.Exit(1)


def whole(name: str, text: str | None) -> int | None:
    """A whole number as people write tokens."""
    from archcompass.advisor import units
    from archcompass.errors import InputError

    if text is None:
        return None
    try:
        return units.tokens(text)
    except InputError as error:
        raise InputError(f"--{name} {error}") from error
