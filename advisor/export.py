"""A design handed over to other tools: an HF folder, our YAML with its schema, launch recipes. Nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from archcompass.advisor import launch
from archcompass.advisor.units import say_bytes
from archcompass.blocks.hf import to_config
from archcompass.blocks.model.files import make_folder, to_yaml, write_text
from archcompass.blocks.model.schema import schema
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import DoesNotFitError, FileFormatError, InputError, UnknownNameError
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.training.plan import Plan

if TYPE_CHECKING:
    from archcompass.blocks.model.module import LanguageModel

TARGETS = ("hf", "yaml", "vllm", "torchrun")

RANDOM = "random"

SCHEMA, MODEL = "model.schema.json", "model.yaml"

GENERATION = {"do_sample": False, "max_new_tokens": 256}
"""Greedy, and an end to it: a design knows no token that ends a text."""


def export(
    spec: ModelSpec,
    folder: Path,
    target: str,
    *,
    weights: str | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    model_type: str | None = None,
    context: int | None = None,
    sequences: int | None = None,
    hardware: Hardware | None = None,
    plan: Plan | None = None,
    data: str = "corpus.txt",
) -> list[Path]:
    """Writes `spec` for one target and returns the files.

    Args:
        folder: made if need be.
        target: one of `TARGETS`.
        weights: "random", the folder of a checkpoint, or None for none (HF and vLLM only).
        dtype: of the weights written; None keeps a checkpoint's float32 and draws random ones in bfloat16.
        model_type: HF family; None takes the model's own, else the first that can say it.
        context, sequences: of the vLLM recipe.
        hardware: the cards of a recipe.
        plan, data: of the training recipe.

    Raises:
        UnknownNameError: no such target.
        ConversionError: the target cannot say this model; names the field.
        FileFormatError: a checkpoint of another model, or a folder that cannot be written to.
        DoesNotFitError: weights that are more than this machine's memory.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    if weights is not None and target not in ("hf", "vllm"):
        raise InputError(f"weights is {weights!r}; only hf and vllm take weights, and the target is {target}")
    if target == "yaml":
        return _yaml(spec, folder)
    if target == "torchrun":
        script = launch.torchrun(spec, plan or Plan(steps=1000, precision="bf16"), data=data, hardware=hardware)
        return [*_yaml(spec, folder), _write(folder / "train.sh", script)]
    config = to_config(spec, model_type)
    recipe = None
    if target == "vllm":
        recipe = launch.vllm(
            config, has_weights=weights is not None, context=context, sequences=sequences, hardware=hardware
        )
    written = _hf(spec, folder, config, weights, dtype)
    return written if recipe is None else [*written, _write(folder / "serve.sh", recipe)]


def _yaml(spec: ModelSpec, folder: Path) -> list[Path]:
    make_folder(folder)
    header = f"# yaml-language-server: $schema={SCHEMA}\n"
    return [
        _write(folder / SCHEMA, json.dumps(schema(), indent=2) + "\n"),
        _write(folder / MODEL, header + to_yaml(spec)),
    ]


def _hf(
    spec: ModelSpec, folder: Path, config: dict[str, Any], weights: str | None, dtype: Literal["fp32", "bf16"] | None
) -> list[Path]:
    make_folder(folder)
    generation = _write(folder / "generation_config.json", json.dumps(GENERATION, indent=2) + "\n")
    if weights is None:
        return [_write(folder / "config.json", json.dumps(config, indent=2) + "\n"), generation]
    from archcompass.blocks.hf.checkpoint import save_pretrained

    save_pretrained(_filled(spec, weights, dtype), folder, str(config["model_type"]))
    return [folder / "config.json", *sorted(folder.glob("model*.safetensors*")), generation]


def _filled(spec: ModelSpec, weights: str, dtype: Literal["fp32", "bf16"] | None) -> LanguageModel:
    """The model with random weights, or those of a checkpoint."""
    import torch

    from archcompass.profiles.measure.build import DTYPES, available_bytes
    from archcompass.profiles.training.checkpoint import latest, load_weights

    wanted = DTYPES[dtype or ("bf16" if weights == RANDOM else "fp32")]
    built = torch.float32 if weights != RANDOM else wanted
    needed, free = spec.parameters().total * built.itemsize, available_bytes(torch.device("cpu"))
    if needed > free:
        raise DoesNotFitError(
            f"the weights of {spec.name} take {say_bytes(needed)}; this machine has {say_bytes(free)} free: leave "
            "--weights out for the configuration alone",
            needs_bytes=needed,
            has_bytes=free,
        )
    model = spec.build(dtype=built)
    if weights != RANDOM:
        checkpoint = latest(Path(weights))
        if checkpoint is None:
            raise FileFormatError(f"weights is {weights!r}, which is neither 'random' nor the folder of a checkpoint")
        load_weights(checkpoint, model)
    if built != wanted:
        narrow = spec.build(dtype=wanted)
        narrow.load_state_dict(model.state_dict())
        return narrow
    return model


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
