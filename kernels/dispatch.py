"""Which implementation serves a call, and why.

Every operation offers up to three: `reference` (the formula, any precision), `torch` (matrix products in plain torch)
and `triton` (the GPU). The caller says `auto`, or names one. A named backend is honoured or refused, never replaced;
`auto` takes the fastest that can run here, and `strict` turns a silent second choice into an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

from archcompass.errors import BackendError, InputError
from archcompass.kernels.cost import Cost, Machine

Backend = Literal["auto", "reference", "torch", "triton"]

FASTEST_FIRST = ("triton", "torch", "reference")


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that serves a call, the reason, and why each faster one was passed over.

    `predicted_ms` is the least time of each alternative, where `predicted` was asked for it.
    """

    operation: str
    backend: str
    reason: str
    rejected: Mapping[str, str] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)

    def predicted(self, work: Mapping[str, Cost], machine: Machine) -> "Choice":
        """The same choice with the least milliseconds that each alternative takes on a machine.

        Args:
            work: by backend, as the operation's `alternatives` states it for the sizes of the call.
            machine: peaks of the device, for the type of the call.
        """
        return replace(self, predicted_ms={backend: machine.milliseconds(cost) for backend, cost in work.items()})


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # asked once, and not traced into
def triton_obstacle(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device, or None when they can."""
    return _obstacle(device_type)


@cache
def _obstacle(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        return None
    if device_type != "cuda":
        return f"tensors are on {device_type}, and Triton kernels need a GPU"
    from torch.utils._triton import has_triton

    if torch.version.hip:
        return "the kernels are compiled and checked for CUDA, not for ROCm"
    if not has_triton():
        return "triton finds no GPU driver"
    major, minor = min(torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count()))
    return None if major >= 8 else f"a GPU here has compute capability {major}.{minor}, and the kernels need 8.0"


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1, set before the first import)."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose(
    operation: str,
    requested: str,
    device: torch.device,
    *,
    refusals: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Choice:
    """Picks the implementation of `operation` for tensors on `device`.

    Args:
        operation: its public name, for messages.
        requested: "auto", or the backend to use.
        device: where the tensors are.
        refusals: backends this call cannot use whatever the machine, each with the reason (a head too wide, say). An
            operation without a Triton kernel refuses "triton" here.
        strict: with "auto", refuse to fall back from the fastest backend.

    Raises:
        InputError: `requested` is no backend.
        BackendError: the requested backend (with `strict`, the fastest) cannot serve this call.
    """
    # A decoding step asks some hundred times for what it asked before; torch.compile asks once and reads no caches.
    decide = _choose if torch.compiler.is_compiling() else _remembered
    return decide(operation, requested, device.type, tuple((refusals or {}).items()), strict)


def settled(requested: str, x: torch.Tensor) -> bool:
    """Whether `choose` need not be asked: "auto" on the CPU is plain torch. A decoding step would ask some hundred times."""
    return requested == "auto" and x.is_cpu


def _choose(
    operation: str, requested: str, device_type: str, refusals: tuple[tuple[str, str], ...], strict: bool
) -> Choice:
    if requested not in ("auto", *FASTEST_FIRST):
        raise InputError(f"backend is {requested!r}; choose auto, reference, torch or triton")
    rejected = dict(refusals)
    if "triton" not in rejected and (obstacle := triton_obstacle(device_type)):
        rejected["triton"] = obstacle
    if requested == "auto":
        return _fastest(operation, rejected, device_type, strict=strict)
    if requested in rejected:
        raise BackendError(f"{operation}: backend {requested!r} cannot run: {rejected[requested]}")
    return Choice(operation, requested, "asked for by name")


_remembered = lru_cache(maxsize=4096)(_choose)


def _fastest(operation: str, rejected: Mapping[str, str], device_type: str, *, strict: bool) -> Choice:
    order = FASTEST_FIRST if device_type == "cuda" else FASTEST_FIRST[1:]
    left = [backend for backend in order if backend not in rejected]
    if not left or (strict and left[0] != order[0]):
        reasons = "; ".join(f"{backend}: {why}" for backend, why in rejected.items())
        raise BackendError(f"{operation}: no backend may serve this call ({reasons})")
    return Choice(operation, left[0], f"fastest that runs on {device_type}", rejected)
