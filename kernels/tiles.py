"""Block sizes of the Triton kernels: small tables by operation, shape and device, instead of tuning at the first call.

An operation keeps its table beside its kernels:

    TILES = Table("linear_attention.output", (
        Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=2), shared_kib=96),
        Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=4, stages=1)),
    ))
    kernel[grid](..., **TILES.pick(q.device, key_dim=128).launch())

The first row that suits the shape and whose shared memory the device has is taken, so rows go from the fastest to the
safest, and the last one suits everything. What a row really needs is read from the compiled kernel by `kernels.aot`,
and a test holds every row to it. The number of rows bounds the number of compiled variants. Torch is imported only to
ask a GPU what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Shared memory one block may use, by compute capability: CUDA C++ Programming Guide, table "Technical Specifications
# per Compute Capability".
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
UNKNOWN_SHARED_KIB = 64
INTERPRETED = 80  # what the interpreter, which has no device, pretends to be

_assumed: ContextVar[int | None] = ContextVar("assumed capability", default=None)


@dataclass(frozen=True)
class Tile:
    """Block sizes (constexpr arguments of the kernel), warps per block and stages of the software pipeline."""

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 1

    def launch(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Row:
    """A tile, and when it may be used.

    Args:
        tile: the block sizes.
        upto: the largest value of each named dimension it serves; a dimension that is not named is not limited.
        shared_kib: shared memory the device must offer.
        capabilities: (lowest, highest) compute capability, as 80 or 120.
    """

    tile: Tile
    upto: Mapping[str, int] = field(default_factory=dict)
    shared_kib: int = 0
    capabilities: tuple[int, int] = (0, 1000)

    def suits(self, capability: int, shape: Mapping[str, int]) -> bool:
        """Whether a device and a shape may use the tile."""
        lowest, highest = self.capabilities
        fits = self.shared_kib <= SHARED_KIB.get(capability, UNKNOWN_SHARED_KIB)
        return lowest <= capability <= highest and fits and all(shape[name] <= most for name, most in self.upto.items())


@dataclass(frozen=True)
class Table:
    """The rows of one kernel, the fastest first; the last one must suit everything."""

    kernel: str
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        last = self.rows[-1]
        if last.upto or last.shared_kib > UNKNOWN_SHARED_KIB or last.capabilities != (0, 1000):
            raise ValueError(f"the last row of the tiles of {self.kernel} must suit every device and shape")

    def pick(self, device: torch.device, **shape: int) -> Tile:
        """The first tile that suits the device and the shape."""
        now = capability(device)
        return next(row.tile for row in self.rows if row.suits(now, shape))


def capability(device: torch.device) -> int:
    """Compute capability of a device, as 80 or 120; of the assumed one inside `assume`."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _capability_of(device.index or 0) if device.type == "cuda" else INTERPRETED


@cache
def _capability_of(index: int) -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@contextmanager
def assume(capability: int) -> Iterator[None]:
    """Picks tiles as for a device of this compute capability: how kernels are compiled for GPUs that are not here."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


def next_power_of_two(value: int, least: int = 16) -> int:
    """The smallest power of two that covers `value`, at least `least` (tensor cores multiply tiles of 16)."""
    return max(least, 1 << max(value - 1, 0).bit_length())
