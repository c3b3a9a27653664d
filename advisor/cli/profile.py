"""`profile`: memory and speed of one model, predicted for a card, measured on this machine, or both."""

from __future__ import annotations

from typing import Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, AsMarkdown, Model, flag, whole, with_flags
from archcompass.advisor.cli.output import print_json, progress

FLAGS = (
    flag("gpu", "The card: 'RTX 4090', '2x h100-sxm', 'cpu', '24GB 1008GB/s 165TFLOPS'."),
    flag("vram", "Memory of one card, instead of its own: 24GB, 24GiB."),
    flag("bandwidth", "Bandwidth of one card's memory, instead of its own: 1008GB/s."),
    flag("tflops", "Dense bf16 TFLOP/s of one card, instead of its own."),
    flag("device", "Measure on this machine: cpu or cuda."),
    flag("batch", "Sequences computed together [1]."),
    flag("prompt", "Tokens of each prompt [1024]: 4096, 100k."),
    flag("generate", "Tokens generated after it [256]."),
    flag("precision", "Storage of the weights \\[bf16]: fp8, int4, q4_k_m ..."),
    flag("kv_precision", "Storage of caches that grow \\[as the activations]."),
    flag("mode", "inference, finetuning or training \\[inference]."),
    flag("engine", "native, transformers, vllm or llama.cpp \\[native]."),
    flag("parallel", "How several cards share it: tensor, data or pipeline \\[as the engine does]."),
    flag("offload", "Share of the routed experts that lies in system memory \\[0].", float),
    flag("optimizer", "Training: adamw, adamw-8bit or sgd \\[adamw]."),
    flag("master_weights", "Training: an fp32 copy of the weights too.", bool, "--master-weights"),
    flag("recompute", "Training, activations made again: none, selective or full \\[none]."),
)
"""Keywords of `profiles.profile.profile`, which has their defaults."""

COUNTED = {"batch": 1, "prompt": 1, "generate": 0}
"""Flags that are whole numbers, and the least that each may be."""


@app.command()
@with_flags(FLAGS)
def profile(model: Model, flags: dict[str, Any], as_json: AsJson = False, markdown: AsMarkdown = False) -> None:
    """Memory and speed of one model: predicted for a card, measured here, or both side by side.

    Examples:

        archcompass profile llama-3.1-8b --gpu "RTX 4090" --precision int4 --prompt 32k

        archcompass profile out/model.yaml --device cpu --prompt 512
    """
    from archcompass.advisor.report.profile import show
    from archcompass.blocks.model.files import load
    from archcompass.profiles.profile import profile as run

    asked = flags | {name: whole(name, flags[name], least) for name, least in COUNTED.items() if name in flags}
    spec = load(model)
    with progress("measuring", quiet="device" not in asked) as update:
        report = run(spec, progress=update, called=model, **asked)
    data = report.model_dump(mode="json")
    if as_json:
        print_json(data)
    else:
        show(data, markdown=markdown)
    if not all(entry["fits"] for entry in data["profiles"]):
        raise typer.Exit(1)
