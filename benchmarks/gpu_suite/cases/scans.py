"""Mamba-1's selective scan, beside mamba-ssm, and the diagonal scan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from archcompass.kernels import diagonal_scan, selective_scan
from archcompass.kernels.dispatch import Backend
from gpu_suite.case import TINY, Case, Inputs, Maker, Shape, Work, package, work


def mamba_inputs(make: Maker, s: Shape) -> Inputs:
    lead = (s["batch"], s["time"]) if "time" in s else (s["batch"],)
    channels, n = s["channels"], s["state"]
    found = {
        "x": make.normal(*lead, channels), "dt": make.strength(*lead, channels), "A": -make.wide(channels, n).exp(),
        "B": make.normal(*lead, n), "C": make.normal(*lead, n), "D": make.wide(channels), "gate": make.normal(*lead, channels),
    }  # fmt: skip
    return found | ({} if "time" in s else {"state": make.wide(s["batch"], channels, n)})


def mamba_call(
    backend: Backend, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor
) -> Any:
    return selective_scan.selective_scan(x, dt, A, B, C, D, gate=gate, backend=backend)


def mamba_step(
    backend: Backend, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Tensor
) -> Any:
    with torch.no_grad():
        return selective_scan.selective_scan_step(x, dt, A, B, C, D, backend=backend, **rest)


def mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Any:
    """mamba-ssm wants channels before time; the copies it makes of ours are part of its time."""
    x, dt, B, C, gate = (t.transpose(1, 2).contiguous() for t in (x, dt, B, C, gate))
    call = package("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    y, last = call(x, dt, A, B, C, D, gate, return_last_state=True)
    return y.transpose(1, 2), last


def mamba_work(s: Shape) -> Work:
    sizes = {"batch": s["batch"], "new_tokens": s.get("time", 1), "channels": s["channels"], "state_dim": s["state"]}
    return work(selective_scan.selective_scan_cost(**sizes, element_bytes=2, gated=True))


def diagonal_inputs(make: Maker, s: Shape) -> Inputs:
    whole = (s["batch"], s["time"], s["channels"])
    return {"g": make.decay(*whole), "x": make.wide(*whole), "state": make.wide(s["batch"], s["channels"])}


def diagonal_call(backend: Backend, g: Tensor, x: Tensor, state: Tensor) -> Any:
    return diagonal_scan.diagonal_scan(g, x, initial_state=state, backend=backend)


def diagonal_work(s: Shape) -> Work:
    return work(diagonal_scan.diagonal_scan_cost(batch=s["batch"], new_tokens=s["time"], channels=s["channels"]))


def cases() -> Iterator[Case]:
    mamba: dict[str, Any] = {
        "operation": "selective_scan", "size": "Mamba 2.8B, 5120 x 16, 4 x 4096", "inputs": mamba_inputs,
        "call": mamba_call, "work": mamba_work, "peers": {"mamba-ssm, with its copies": mamba_ssm},
        "real": {"batch": 4, "time": 4096, "channels": 5120, "state": 16},
        "check": {"batch": 2, "time": 203, "channels": 256}, "tiny": TINY | {"channels": 20, "state": 8},
    }  # fmt: skip
    yield Case(**mamba, kind="forward", quick=True)
    yield Case(**mamba, kind="backward", gradients=("x", "dt", "A", "B", "C", "D", "gate"))
    one = {"batch": 128, "channels": 5120, "state": 16}
    step = {"size": "Mamba 2.8B, 5120 x 16, batch 128", "call": mamba_step, "real": one, "check": {}, "peers": {}}
    yield Case(**mamba | step | {"tiny": {"batch": 3, "channels": 20, "state": 8}}, kind="step")
    diagonal: dict[str, Any] = {
        "operation": "diagonal_scan", "size": "4096 channels, 4 x 4096", "dtype": torch.float32,
        "inputs": diagonal_inputs, "call": diagonal_call, "work": diagonal_work,
        "peers": {"our torch path": lambda g, x, state: diagonal_call("torch", g, x, state)},
        "real": {"batch": 4, "time": 4096, "channels": 4096}, "check": {"batch": 2, "time": 203},
        "tiny": TINY | {"channels": 20},
    }  # fmt: skip
    yield Case(**diagonal, kind="forward", quick=True)
    yield Case(**diagonal, kind="backward", gradients=("g", "x"))
