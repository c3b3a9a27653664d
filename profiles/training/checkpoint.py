"""What a run must keep to go on as if it had never stopped: a folder `step-00000040` of

    model.yaml, model.safetensors       the design, which every other command reads, and its weights
    optimizer.safetensors               moments, and the states of the random generators
    state.json                          step, schedule, losses, plan, and what the data was

It is written under another name and renamed when whole, so a run that is killed leaves the last checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from archcompass.blocks.model.files import read_text, to_yaml
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import FileFormatError, InputError

WEIGHTS, MOMENTS, STATE, MODEL = "model.safetensors", "optimizer.safetensors", "state.json", "model.yaml"

_NAME = re.compile(r"step-(\d{8})")


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or the folder itself when it is one."""
    if (folder / STATE).is_file():
        return folder
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, default=None)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be. A run that dies lets go.

    Raises:
        InputError: another run is at work there.
        FileFormatError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be written to: {error.strerror}") from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock: two runs in one folder are the reader's own risk there.
        except OSError as error:
            raise InputError(f"{folder} is in use by another run; give each run a folder of its own") from error
        _sweep(folder)
        yield


def _sweep(folder: Path) -> None:
    """Removes what a killed run left half-written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def save(
    folder: Path,
    spec: ModelSpec,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint of `state["step"]` and removes the one before it.

    Args:
        model: the weights in the optimizer's precision.
        state: plain data; schedule and random generators are added here.

    Raises:
        FileFormatError: the folder cannot be written to.
    """
    final = folder / f"step-{state['step']:08d}"
    before = latest(folder)
    temporary = ""
    try:
        temporary = tempfile.mkdtemp(dir=folder, prefix=f".{final.name}.")
        _write(Path(temporary), spec, model, optimizer, schedule, state)
        for path in Path(temporary).iterdir():
            path.chmod(0o644)
        os.chmod(temporary, 0o755)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        raise FileFormatError(f"{final} cannot be written: {error}") from error
    if before is not None and before not in (final, folder):
        shutil.rmtree(before, ignore_errors=True)
    return final


def _write(
    target: Path,
    spec: ModelSpec,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    state: dict[str, Any],
) -> None:
    tensors, numbers = _moments(optimizer)
    (target / MODEL).write_text(to_yaml(spec), encoding="utf-8")
    save_model(model, str(target / WEIGHTS), metadata={"format": "pt"})
    save_file(tensors | _generators(), str(target / MOMENTS))
    content = state | {"archcompass": 1, "schedule": schedule.state_dict(), "optimizer": numbers}
    (target / STATE).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _moments(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizer's tensors by name, and its groups as plain data."""
    kept = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, entry in kept["state"].items()
        for name, tensor in entry.items()
    }
    return tensors, kept["param_groups"]


def _generators() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        FileFormatError: it is no state of ours.
    """
    try:
        content = json.loads(read_text(checkpoint / STATE))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{checkpoint.name}/{STATE} is no JSON: {error}") from error
    needed = {"archcompass", "step", "plan", "losses", "held_out", "data", "schedule", "optimizer"}
    if not isinstance(content, dict) or not needed <= set(content):
        raise FileFormatError(f"{checkpoint.name}/{STATE} is no state of a training run")
    return content


def restore(
    checkpoint: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> None:
    """Puts weights, moments, schedule and random generators back where they were.

    Raises:
        FileFormatError: a file is missing, damaged, or of another model.
    """
    load_weights(checkpoint, model)
    try:
        tensors = load_file(str(checkpoint / MOMENTS))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            if index.isdigit():
                moments.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": state["optimizer"]})
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{checkpoint.name} cannot be continued: {_plain(error)}") from error


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fills `model` with a checkpoint's weights.

    Raises:
        FileFormatError: no such file, damaged, or of another model.
    """
    try:
        load_model(model, str(checkpoint / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FileFormatError(f"{checkpoint.name}/{WEIGHTS} does not hold this model: {_plain(error)}") from error


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
