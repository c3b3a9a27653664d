"""What this machine is and which kernel serves which operation on it, and why. Imports torch; prints nothing."""

from __future__ import annotations

import inspect
import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from archcompass.errors import ArchcompassError
from archcompass.kernels.cost import Machine
from archcompass.profiles.hardware import find

PACKAGES = ("archcompass", "torch", "triton", "pydantic", "typer", "rich", "fvcore", "safetensors", "transformers")


def examine() -> dict[str, Any]:
    """Versions, devices and operations, ready for JSON."""
    return {"versions": _versions(), "devices": _devices(), "operations": _operations()}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = {
        "device": "cpu",
        "name": find("cpu").name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    cards = [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    return [cpu, *cards]


def operations() -> list[str]:
    """Names of all operations: the folders of kernels/ that have a public function."""
    here = Path(__file__).resolve().parent.parent / "kernels"
    return sorted(path.parent.name for path in here.glob("*/op.py"))


def _operations() -> list[dict[str, Any]]:
    import torch

    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    machines = [_machine(device) for device in devices]
    pairs = list(zip(devices, machines, strict=True))
    return [_operation(name, device, machine) for name in operations() for device, machine in pairs]


def _machine(device: Any) -> Machine | None:
    """Peaks of a device in bfloat16, as its data sheet or the processor's instruction set has them; None if unknown."""
    import torch

    try:
        found = find("cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
    except ArchcompassError:
        return None
    return Machine(flops_per_second=found.rate("bf16"), bytes_per_second=found.bandwidth_bytes_per_second)


def _operation(name: str, device: Any, machine: Machine | None) -> dict[str, Any]:
    """The backend that serves an operation, and what each would take at best for a call of a usual size."""
    import torch

    cost = import_module(f"archcompass.kernels.{name}.cost")
    explain = import_module(f"archcompass.kernels.{name}.op").explain
    tensors = [p for p in inspect.signature(explain).parameters.values() if p.default is p.empty]
    probe = torch.empty(1, 64, 4, 64, device=device, dtype=torch.bfloat16)
    choice = explain(*[probe] * len(tensors))
    if machine is not None:
        choice = choice.predicted(cost.alternatives(**cost.EXAMPLE), machine)
    return {
        "operation": name,
        "device": device.type,
        "backend": choice.backend,
        "reason": choice.reason,
        "rejected": dict(choice.rejected),
        "example": cost.EXAMPLE,
        "predicted_ms": dict(choice.predicted_ms),
    }
