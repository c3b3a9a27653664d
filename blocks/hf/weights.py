"""How one tensor of ours is made from the tensors of a checkpoint, and back. The forms are data; torch enters as tensors.

A tensor that is the same on both sides stays a view of the mapped file; every other form makes one new tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Form(Protocol):
    """The two directions."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The checkpoint's tensors -> ours. They may be read as they are asked for, so ask once and let go."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Ours -> the checkpoint's tensors, in the same order."""


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, as it is."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Several tensors, one below the other, with these many rows."""

    sizes: tuple[int, ...]
    dim: int = 0

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        first = parts[0]
        whole = _room(first, (*first.shape[: self.dim], sum(self.sizes), *first.shape[self.dim + 1 :]))
        filled = first.shape[self.dim]
        whole.narrow(self.dim, 0, filled).copy_(first)
        del first
        for index in range(1, len(parts)):
            part = parts[index]
            whole.narrow(self.dim, filled, part.shape[self.dim]).copy_(part)
            filled += part.shape[self.dim]
        if filled != sum(self.sizes):
            raise RuntimeError(f"{filled} rows in place of {sum(self.sizes)}")
        return whole

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(list(self.sizes), dim=self.dim))


@dataclass(frozen=True, slots=True)
class Reshaped:
    """One tensor with the same numbers in another shape."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.ours)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(self.theirs)]


@dataclass(frozen=True, slots=True)
class Transposed:
    """One tensor whose last two dimensions are exchanged."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].transpose(-1, -2).contiguous()

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.transpose(-1, -2).contiguous()]


@dataclass(frozen=True, slots=True)
class Permuted:
    """One tensor whose rows (or entries of `dim`) stand in another order: ours[i] = theirs[order[i]]."""

    order: tuple[int, ...]
    dim: int = 0

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return parts[0].index_select(self.dim, torch.tensor(self.order))

    def split(self, tensor: Tensor) -> list[Tensor]:
        import torch

        return [tensor.index_select(self.dim, torch.argsort(torch.tensor(self.order)))]


@dataclass(frozen=True, slots=True)
class Stacked:
    """One entry per expert along a new first dimension; each entry is made from `inner` tensors of the checkpoint."""

    count: int
    inner: Form = field(default_factory=Same)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        each = len(parts) // self.count
        first = self.inner.join(parts[:each])
        whole = _room(first, (self.count, *first.shape))
        whole[0] = first
        for index in range(1, self.count):
            whole[index] = self.inner.join(parts[index * each : (index + 1) * each])
        return whole

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [part for entry in tensor for part in self.inner.split(entry)]


@dataclass(frozen=True, slots=True)
class Then:
    """Two forms in a row: the checkpoint's tensors through `first`, its result through `second`."""

    first: Form
    second: Form

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return self.second.join([self.first.join(parts)])

    def split(self, tensor: Tensor) -> list[Tensor]:
        return self.first.split(self.second.split(tensor)[0])


def _room(piece: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `piece` and others are joined to, outside the heap, in which every piece before it would leave a hole."""
    from archcompass.kernels import pages

    return pages.empty(math.prod(shape), piece.dtype).view(shape) if piece.is_cpu else piece.new_empty(shape)


SAME = Same()


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the `LanguageModel`.

    Attributes:
        ours: its name in `state_dict()`.
        theirs: the checkpoint's tensors it is made from, in the form's order.
        form: how.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME


def same(ours: str, theirs: str) -> Weight:
    """A tensor that only changes its name."""
    return Weight(ours, (theirs,))
