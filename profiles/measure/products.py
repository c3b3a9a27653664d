"""What a machine reaches in products of matrices and in attention, by shape: the curves that all blocks share.

Weights and caches are cycled through until no cache can hold them, as the layers of a model do; where few rows meet them, other
memory is read before each call besides, since in a model no operation finds its own code and data where it left them. Where few
rows meet a weight its bytes decide the time; the curve over rows holds that too, since efficiency is told by the time that was
really taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle, pairwise
from statistics import median

import torch

from archcompass.blocks.base import Block, Op, known_blocks
from archcompass.blocks.runtime import GrowingState, Linear
from archcompass.profiles.efficiency import Curve, KindEfficiency, scaled
from archcompass.profiles.measure import build
from archcompass.profiles.measure.clock import processor_clock, repeat
from archcompass.profiles.request import Request

ROWS = (1, 4, 16, 64, 256, 1024)
ELEMENTS = (2**16, 2**18, 2**20, 2**22, 2**24)
EXPERT_ROWS = (1, 4, 16, 64, 256)
EXPERT_ELEMENTS = (2**17, 2**19, 2**21)
TOKENS = (32, 128, 512, 2048)
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
KEYS = (128, 512, 2048, 8192)

COLD_BYTES = 96 * 2**20
"""More than the caches of a processor hold."""

_WEIGHT_ELEMENTS = 2**20
_SIDE = 1024

FEW_ROWS = 64
"""Up to here a product takes about as long as reading its weight."""

PRODUCTS_OF_A_LAYER = 4
"""What runs between one layer's attention and the next, each with a weight of four megabytes."""

NEVER = 4.0
"""The most an efficiency may be: caches beat the memory they stand before, but not by more than this."""


def share(ideal: float, spent: float) -> float:
    """An efficiency: roofline time over measured time, kept within what can be."""
    return min(NEVER, max(1e-6, ideal / max(spent, 1e-12)))


@dataclass(frozen=True)
class Products:
    """Products of one machine in one dtype.

    Attributes:
        peaks: FLOP/s by dtype and "bandwidth", which efficiencies are shares of.
        name: "bf16" or "fp32".
    """

    device: torch.device
    peaks: dict[str, float]
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return build.DTYPES[self.name]

    def gemm(self) -> KindEfficiency:
        """Products by rows and size of the weight."""
        launch = self._product(1, 64) * 0.8
        times = {
            (rows, size): max(self._product(rows, math.isqrt(size)) - launch, 1e-9)
            for rows in ROWS
            for size in ELEMENTS
        }
        read_no_slower(times, ELEMENTS)
        never_falling(times, ROWS, ELEMENTS)
        moved = {size: float((size + 2 * math.isqrt(size)) * self.dtype.itemsize) for size in ELEMENTS}
        memory = {moved[size]: share(moved[size] / self.peaks["bandwidth"], times[1, size]) for size in ELEMENTS}
        return KindEfficiency(
            compute=self._over(times, ROWS, ELEMENTS), memory=Curve.over(scaled(memory)), launch_seconds=launch
        )

    def grouped(self) -> KindEfficiency:
        """Products of experts by rows that one expert gets and size of its weight; a single token runs expert by expert."""
        times = {(rows, size): self._experts(rows, size) for rows in EXPERT_ROWS for size in EXPERT_ELEMENTS}
        never_falling(times, EXPERT_ROWS, EXPERT_ELEMENTS)
        compute = self._over(times, EXPERT_ROWS, EXPERT_ELEMENTS)
        return KindEfficiency(compute=compute, memory=Curve.constant(1.0), launch_seconds=0.0)

    def _over(self, times: dict[tuple[int, int], float], rows: Sequence[int], sizes: Sequence[int]) -> Curve:
        values = tuple(
            tuple(share(2.0 * row * size / self.peaks[self.name], times[row, size]) for size in sizes) for row in rows
        )
        return Curve(tuple(map(float, rows)), tuple(map(float, sizes)), values)

    def _product(self, rows: int, side: int) -> float:
        """Seconds of a linear layer over [rows, side] whose weight [side, side] is in no cache."""
        copies = self._copies(side * side * self.dtype.itemsize) if rows <= FEW_ROWS else 2
        x = torch.randn(rows, side, device=self.device).to(self.dtype)
        calls = [partial(_layer(weight).forward, x) for weight in self._cold((side, side), copies)]
        return self._each(calls, least=3, between=int(rows <= FEW_ROWS))

    def _experts(self, rows: int, size: int) -> float:
        """Seconds that one expert takes of a grouped product with `rows` rows for each."""
        from archcompass.kernels.moe.grouped import GROUPED_MM, by_expert, grouped_mm_obstacle, multiply

        columns, inner = 2 ** (size.bit_length() // 2), size // 2 ** (size.bit_length() // 2)
        experts = max(8, min(64, COLD_BYTES // 2 // (size * self.dtype.itemsize)))
        weights = torch.stack(self._cold((columns, inner), experts))
        x = torch.randn(rows * experts, inner, device=self.device).to(self.dtype)
        groups = by_expert(torch.arange(experts, device=self.device).repeat_interleave(rows)[:, None], experts)
        on_device = self.device.type == "cuda" and grouped_mm_obstacle(x, weights) is None

        def all_together() -> None:
            if on_device:
                GROUPED_MM(x, weights.transpose(1, 2), offs=groups.ends)
            else:
                multiply(x, weights.transpose(1, 2), None, groups)

        if rows == 1 and not on_device:
            return self._each([partial(_layer(weight).forward, x[:1]) for weight in weights], least=2)
        return self._each([all_together], least=2) / experts

    def _cold(self, shape: tuple[int, int], copies: int) -> list[torch.Tensor]:
        first = torch.randn(shape, device=self.device).to(self.dtype)
        return [first, *(first.clone() for _ in range(copies - 1))]

    def attention(self) -> KindEfficiency:
        """Prompts by length, single steps by depth, with 16 heads of 64 channels over 16 and over 4 key heads."""
        launch = self._attention(1, 1, 4) * 0.8
        computing: list[dict[float, float]] = []
        moving: list[Curve] = []
        for key_heads in (16, 4):
            compute, memory = {1.0: 0.0}, {}
            for keys in KEYS:
                op = _attention_op(1, keys, key_heads, self.name)
                spent = max(self._attention(1, keys, key_heads) - launch, 1e-9)
                memory[op.bytes] = share(op.bytes / self.peaks["bandwidth"], spent)
                compute[1.0] = max(compute[1.0], share(op.flops / self.peaks[self.name], spent))
            for new in PROMPTS:
                op = _attention_op(new, new, key_heads, self.name)
                spent = max(self._attention(new, new, key_heads) - launch, 1e-9)
                compute[float(new)] = share(op.flops / self.peaks[self.name], spent)
            computing.append(compute)
            moving.append(Curve.over(scaled(memory)))
        return KindEfficiency(
            compute=Curve(tuple(computing[0]), (1.0, 4.0), tuple(zip(*(c.values() for c in computing), strict=True))),
            memory=_side_by_side(moving),
            launch_seconds=launch,
        )

    def _attention(self, new: int, keys: int, key_heads: int) -> float:
        from archcompass.kernels.attention import attention

        q = torch.randn(1, new, 16, 64, device=self.device).to(self.dtype)
        copies = self._copies(2 * keys * key_heads * 64 * self.dtype.itemsize) if new <= FEW_ROWS else 1
        calls = [partial(attention, q, *self._cache(keys, key_heads)) for _ in range(copies)]
        return self._each(calls, least=2, between=PRODUCTS_OF_A_LAYER if new <= FEW_ROWS else 0)

    def _cache(self, keys: int, key_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, keys, key heads, 64], lying as a block's cache lays them."""
        k, v = (torch.randn(1, keys, key_heads, 64, device=self.device).to(self.dtype) for _ in range(2))
        kept = GrowingState().append(key=k, value=v)
        return kept["key"], kept["value"]

    def _copies(self, size_bytes: int) -> int:
        """So many pieces of memory that, with what is read between them, no cache holds them until their next turn."""
        between = 4 * _WEIGHT_ELEMENTS if self.device.type == "cpu" else 0
        return max(1, min(128, COLD_BYTES // (size_bytes + between)))

    def _each(self, calls: Sequence[Callable[[], object]], least: int, between: int = 0) -> float:
        """Median seconds of one of `calls`, made in turn, each after so many other products."""
        on_processor, now, inside = self.device.type == "cpu", processor_clock(), list[float]()
        row = torch.ones(1, _SIDE, dtype=self.dtype)

        def one_after_another() -> None:
            spent = 0.0
            for call in calls:
                for _ in range(between if on_processor else 0):
                    next(self._others).forward(row)
                start = now()
                call()
                spent += now() - start
            inside.append(spent)

        times = repeat(one_after_another, self.device, seconds=0.12, least=least, most=20)
        return (median(inside[1:]) if on_processor else times.ms * 1e-3) / len(calls)

    @cached_property
    def _others(self) -> Iterator[Linear]:
        """Layers of four megabytes without end, none of which a cache still holds: they drive out what was there. (Sums over
        as much memory do not: caches see through them.)"""
        columns = 4 * _WEIGHT_ELEMENTS // (_SIDE * self.dtype.itemsize)
        copies = max(1, COLD_BYTES // (4 * _WEIGHT_ELEMENTS))
        return cycle([_layer(torch.ones(columns, _SIDE, dtype=self.dtype)) for _ in range(copies)])


def ballast() -> Iterator[torch.Tensor]:
    """Four megabytes of memory after four others, without end: read, they drive out of the caches what was there."""
    return cycle(torch.ones(COLD_BYTES // 4).split(_WEIGHT_ELEMENTS))


def never_falling(times: dict[tuple[int, int], float], rows: Sequence[int], sizes: Sequence[int]) -> None:
    """More rows or a larger weight never take less time; noise that says so is levelled."""
    for row_index, row in enumerate(rows):
        for size_index, size in enumerate(sizes):
            before = [times[rows[row_index - 1], size]] if row_index else []
            before += [times[row, sizes[size_index - 1]]] if size_index else []
            times[row, size] = max([times[row, size], *before])


def read_no_slower(times: dict[tuple[int, int], float], sizes: Sequence[int]) -> None:
    """A larger weight that lies in no cache is read no slower than a smaller one; noise that says so is levelled."""
    for before, size in pairwise(sizes):
        times[1, size] = min(times[1, size], times[1, before] * size / before)


def _layer(weight: torch.Tensor) -> Linear:
    """The layer that blocks use, around a weight [out, in]."""
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _side_by_side(curves: Sequence[Curve]) -> Curve:
    """Curves over bytes of single and of four-fold grouped queries as one; a prompt's queries are bound by arithmetic."""
    sizes = sorted({size for curve in curves for size in curve.x})
    return Curve(tuple(sizes), (1.0, 4.0, 64.0), tuple((*(curve.at(size) for curve in curves), 1.0) for size in sizes))


def instance(kind: str, heads: int, key_heads: int = 4) -> Block:
    """An attention or MLP block of ordinary shape."""
    if kind == "attention":
        fields = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 64}
        return known_blocks()[kind].model_validate(fields)
    return known_blocks()[kind].model_validate({"intermediate_size": 512})


def _attention_op(new: int, keys: int, key_heads: int, name: str) -> Op:
    step = Request(precision=name).step(new, keys - new)
    work = instance("attention", 16, key_heads).work(1024, step)
    return next(op for op in work if op.kind == "attention")
