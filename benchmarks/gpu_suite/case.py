"""One call of one operation, at three sizes: `real` is timed, `check` is one that the formula in float64 can follow on the same
device (the widths being kept, so that the same kernels are compiled), and `tiny` is for Triton's interpreter.

Work is that of the operation's own cost function. Where a case has gradients it is the backward pass that is timed: FLOPs
are `backward_products` times those of the forward pass (every product has two gradients; attention makes five products of
two), bytes every input read, and every gradient read or written, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from archcompass.kernels.cost import Cost

Shape = Mapping[str, int]

Inputs = dict[str, Tensor]

Call = Callable[..., Any]

TINY = {"batch": 1, "time": 37}


@dataclass(frozen=True)
class Maker:
    """Makes inputs of a case on a device: `normal` in the dtype under test, `wide` ones in float32 (gates, states)."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def wide(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def unit(self, *shape: int) -> Tensor:
        """Keys of length one, as the delta rule wants them."""
        return normalize(self.wide(*shape), dim=-1).to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        """Log decays as trained gates give them: mostly close to 0, sometimes strong."""
        return logsigmoid(self.wide(*shape) + 3.0)

    def strength(self, *shape: int) -> Tensor:
        return self.wide(*shape).sigmoid().to(self.dtype)


class Work(NamedTuple):
    """FLOPs and the least bytes of one call."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. `call(backend, **inputs)` and every peer `(**inputs)` return a tensor or a tuple of them."""

    operation: str
    kind: str
    size: str
    real: Shape
    inputs: Callable[[Maker, Shape], Inputs]
    call: Call
    work: Callable[[Shape], Work]
    check: Shape = field(default_factory=dict)
    tiny: Shape = field(default_factory=dict)
    peers: Mapping[str, Call] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    backward_products: float = 2.0
    together: bool = False  # forward and backward are one piece of work, and `work` counts both
    dtype: torch.dtype = torch.bfloat16
    interpreted: torch.dtype = torch.float32  # bfloat16 is not to be trusted in the interpreter
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.operation} {self.kind}, {self.size}"


def work(cost: Cost, more_bytes: float = 0.0) -> Work:
    """The work that a cost function states, and bytes it leaves to its caller (weights)."""
    return Work(cost.flops, cost.activation_bytes + cost.state_bytes + more_bytes)


def package(module: str, name: str) -> Call:
    """A function of a package that may not be here; it is looked up when the case is run."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call
