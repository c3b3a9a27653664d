"""Measures what this machine reaches: products by shape and dtype, memory, attention, every block, every launch.

A table of efficiencies comes out (see `profiles.efficiency`): efficiency = roofline time / measured time. Products and
attention are measured alone. What else a block does is measured as what is left of the block's time when its products are
taken off, and shared out among its other operations in proportion to what they should cost.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from archcompass.blocks.base import Block, Op, Step, known_blocks
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.runtime import BlockState, Context, Linear
from archcompass.profiles.efficiency import (
    ACCELERATOR,
    PROCESSOR,
    Curve,
    Efficiency,
    KindEfficiency,
    coordinates,
    scaled,
    seconds,
)
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.measure import build
from archcompass.profiles.measure.clock import repeat
from archcompass.profiles.measure.model import Progress, silent
from archcompass.profiles.measure.peak import tensor_peak_bytes
from archcompass.profiles.measure.probe import peaks
from archcompass.profiles.predict import owned_work, sublayer_work, time_of
from archcompass.profiles.request import Request

ROWS = (1, 4, 16, 64, 256, 1024)
ELEMENTS = (2**18, 2**20, 2**22, 2**24)
TOKENS = (16, 128, 512, 2048)
KEYS = (256, 2048, 8192)

# Copies of a weight are cycled through until they are larger than any cache, as a model's layers do.
_COLD_BYTES = 96 * 2**20

# Eight of ten measured times over their predictions in benchmarks/accuracy.py, on a machine that was busy with other work.
SPREAD = {"prefill": (0.75, 1.4), "decode": (0.9, 1.9)}

_NEVER = 4.0
"""The most an efficiency may be: caches beat the memory they stand before, but not by more than this."""


def calibrate(
    device: str = "cpu",
    *,
    progress: Progress = silent,
    budget_seconds: float = 150.0,
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
) -> Efficiency:
    """This machine's table.

    Args:
        device: "cpu" or "cuda".
        progress: told how far it is.
        budget_seconds: blocks that would begin after it are left out, and the table says which.
        dtypes: which of "bf16" and "fp32" to measure, the first as the one that serves all others.

    Raises:
        InputError: no such device.
    """
    place = build.device_of(device)
    bench = _Bench(place, time.perf_counter() + budget_seconds, progress, dtypes)
    with torch.inference_mode():
        return bench.run()


@dataclass
class _Bench:
    """One calibration: what it measures on, until when, and what it has found."""

    device: torch.device
    deadline: float
    progress: Progress
    dtypes: tuple[str, ...]
    live: dict[str, float] = field(default_factory=dict)

    def run(self) -> Efficiency:
        self.progress(0.0, "peaks of products and memory")
        self.peaks = peaks(str(self.device))
        base = ACCELERATOR if self.device.type == "cuda" else PROCESSOR
        kinds = dict(base.kinds)
        for number, name in enumerate(self.dtypes):
            self.progress(0.02 + 0.2 * number, f"matrix products in {name}")
            kinds[f"gemm:{name}"] = self.gemm(name)
            self.progress(0.14 + 0.2 * number, f"attention in {name}")
            kinds[f"attention:{name}"] = self.attention(name)
        kinds["gemm"], kinds["attention"] = (kinds[f"{kind}:{self.dtypes[0]}"] for kind in ("gemm", "attention"))
        table = Efficiency(
            name=_machine_name(self.device),
            source="calibrated",
            kinds=kinds,
            layer_seconds=0.0,
            step_seconds=0.0,
            overlaps=base.overlaps,
            peaks=self.peaks,
            spread=SPREAD,
        )
        table, left_out = self.blocks(table)
        constant = self.step_constant(table)
        return replace(table, step_seconds=constant, live=self.live, made=_made(self.device, left_out))

    def gemm(self, name: str) -> KindEfficiency:
        """Products by rows and size of the weight."""
        dtype = build.DTYPES[name]
        launch = self._product(1, 64, dtype) * 0.8
        times = {
            (rows, size): max(self._product(rows, math.isqrt(size), dtype) - launch, 1e-9)
            for rows in ROWS
            for size in ELEMENTS
        }
        _never_falling(times)
        width = 4 if name == "fp32" else 2
        moved = {size: float((size + 2 * math.isqrt(size)) * width) for size in ELEMENTS}
        memory = {moved[size]: self._share(moved[size] / self.peaks["bandwidth"], times[1, size]) for size in ELEMENTS}
        compute = tuple(
            tuple(self._share(2.0 * rows * size / self.peaks[name], times[rows, size]) for size in ELEMENTS)
            for rows in ROWS
        )
        return KindEfficiency(
            compute=Curve(tuple(map(float, ROWS)), tuple(map(float, ELEMENTS)), compute),
            memory=Curve.over(scaled(memory)),
            launch_seconds=launch,
        )

    def _product(self, rows: int, side: int, dtype: torch.dtype) -> float:
        """Seconds of x [rows, side] times a weight [side, side] that is in no cache."""
        weight_bytes = side * side * dtype.itemsize
        copies = max(1, min(48, _COLD_BYTES // weight_bytes)) if rows <= 64 else 2
        weights = [torch.randn(side, side, device=self.device).to(dtype) for _ in range(min(copies, 2))]
        weights += [weights[0].clone() for _ in range(copies - len(weights))]
        x = torch.randn(rows, side, device=self.device).to(dtype)

        def cycle() -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        return repeat(cycle, self.device, seconds=0.12, least=2, most=12).ms * 1e-3 / len(weights)

    def attention(self, name: str) -> KindEfficiency:
        """Prompts by length, single steps by depth, with 16 heads of 64 channels over 16 and over 4 key heads."""
        launch = self._attention(1, 1, 4, name) * 0.8
        computing: list[dict[float, float]] = []
        moving: list[dict[float, float]] = []
        for key_heads in (16, 4):
            compute, memory = {1.0: 0.0}, {}
            for keys in KEYS:
                op = _attention_op(1, keys, key_heads, name)
                spent = max(self._attention(1, keys, key_heads, name) - launch, 1e-9)
                memory[op.bytes * 4 / key_heads] = self._share(op.bytes / self.peaks["bandwidth"], spent)
                compute[1.0] = max(compute[1.0], self._share(op.flops / self.peaks[name], spent))
            for new in TOKENS:
                op = _attention_op(new, new, key_heads, name)
                spent = max(self._attention(new, new, key_heads, name) - launch, 1e-9)
                compute[float(new)] = self._share(op.flops / self.peaks[name], spent)
            computing.append(compute)
            moving.append(scaled(memory))
        single, grouped = moving
        return KindEfficiency(
            compute=Curve(tuple(computing[0]), (1.0, 4.0), tuple(zip(*(c.values() for c in computing), strict=True))),
            memory=Curve(
                tuple(grouped),
                (1.0, 4.0, 64.0),
                tuple((one, four, 1.0) for one, four in zip(single.values(), grouped.values(), strict=True)),
            ),
            launch_seconds=launch,
        )

    def _attention(self, new: int, keys: int, key_heads: int, name: str) -> float:
        from archcompass.kernels.attention import attention

        dtype = build.DTYPES[name]
        q = torch.randn(1, new, 16, 64, device=self.device).to(dtype)
        copies = max(1, min(16, _COLD_BYTES // (2 * keys * key_heads * 64 * dtype.itemsize))) if new == 1 else 1
        caches = [
            [torch.randn(1, keys, key_heads, 64, device=self.device).to(dtype) for _ in range(2)] for _ in range(copies)
        ]

        def cycle() -> None:
            for k, v in caches:
                attention(q, k, v)

        return repeat(cycle, self.device, seconds=0.15, least=2, most=20).ms * 1e-3 / copies

    def blocks(self, table: Efficiency) -> tuple[Efficiency, list[str]]:
        """`table` with the operations of every block, and the names of blocks that were left out."""
        kinds, left_out = dict(table.kinds), []
        todo = [(name, block, width) for name in self.dtypes for block, width in _typical()]
        for index, (name, block, width) in enumerate(todo):
            self.progress(0.42 + 0.55 * index / len(todo), f"{block.kind} in {name}")
            if time.perf_counter() > self.deadline:
                left_out.append(f"{block.kind} in {name}")
                continue
            kinds |= self.block(replace(table, kinds=kinds), block, width, name)
            self.live[f"{block.kind}:{name}"] = self.live_factor(block, width, name)
        return replace(table, kinds=kinds), left_out

    def block(self, table: Efficiency, block: Block, width: int, name: str) -> dict[str, KindEfficiency]:
        """Efficiencies of the operations that only this block has, from its time at several lengths."""
        request = Request(precision=name)
        launch = self._launch(table, block, name)
        steps = [request.step(1, 64), *(request.step(new) for new in TOKENS)]
        rests, factors = [], []
        for step in steps:
            spent, done = self._sublayer(block, width, step, name)
            rest = _rest(table, _alone(block, width), step, self.peaks, done)
            left = spent - rest.known - launch * rest.count
            factors.append(max(left, 0.02 * spent) / max(sum(wanted * op.count for op, wanted in rest.own), 1e-9))
            rests.append(rest)
        factors[1:] = _levelled(factors[1:])
        points: dict[str, list[_Point]] = {}
        for step, rest, factor in zip(steps, rests, factors, strict=True):
            for op, wanted in rest.own:
                points.setdefault(op.name, []).append(_Point(step.new_tokens, op, wanted * factor))
        return {
            f"{block.kind}/{op_name}:{found[0].op.compute}": self._curves(found, launch)
            for op_name, found in points.items()
        }

    def _launch(self, table: Efficiency, block: Block, name: str) -> float:
        """Host seconds of one of the block's own operations: a step of a tiny block is nothing but launches."""
        small, width = type(block).tiny()[0], 60
        try:
            small.check(width)
            step = Request(precision=name).step(1, 8)
            spent, done = self._sublayer(small, width, step, name)
        except (RuntimeError, ValueError):
            return 10e-6
        rest = _rest(table, _alone(small, width), step, self.peaks, done)
        return max(1e-6, (spent - rest.known) / max(rest.count, 1)) * 0.9

    def _sublayer(self, block: Block, width: int, step: Step, name: str) -> tuple[float, float]:
        """(seconds of one forward of the block with its norm and residual sum, FLOPs of the products left out).

        Products of the block's linear layers are measured by themselves and left out here, so that what is small beside
        them is seen. Layers are cycled to stay out of caches, and share one context, as the layers of a model do.
        """
        spec, dtype = _alone(block, width), build.DTYPES[name]
        weight_bytes = block.parameters(width).total * dtype.itemsize
        copies = max(1, min(8, _COLD_BYTES // max(weight_bytes, 1))) if step.new_tokens == 1 else 1
        layers = [build.sublayer(spec, "block", self.device, dtype) for _ in range(copies)]
        x = torch.randn(step.batch, step.new_tokens, width, device=self.device).to(dtype)
        states: list[BlockState | None] = [None] * copies
        if step.past_tokens:
            past = torch.randn(step.batch, step.past_tokens, width, device=self.device).to(dtype)
            states = [layer(past, None, Context(embeddings=past))[1] for layer in layers]
        context = Context(past=step.past_tokens, embeddings=x)

        def cycle() -> None:
            for index, layer in enumerate(layers):
                _, after = layer(x, states[index], context)
                states[index] = after if step.past_tokens else None

        with without_products() as done:
            cycle()
            flops = done[0] / copies
            times = repeat(cycle, self.device, seconds=0.2, least=3, most=40 if step.new_tokens == 1 else 10)
        return times.ms * 1e-3 / copies, flops

    def live_factor(self, block: Block, width: int, name: str) -> float:
        """Memory alive in a sublayer over 512 tokens, its input and output streams included, over what the block states."""
        step, dtype = Request(precision=name).step(512), build.DTYPES[name]
        layer = build.sublayer(_alone(block, width), "block", self.device, dtype)
        x = torch.randn(1, 512, width, device=self.device).to(dtype)
        kept: list[Any] = []
        peak, left = tensor_peak_bytes(lambda: kept.append(layer(x, None, Context(embeddings=x))), self.device)
        state = max(0, left - x.nbytes)
        return round((x.nbytes + peak - state) / (2 * x.nbytes + block.live(width, step).peak_bytes), 4)

    def _curves(self, found: list[_Point], launch: float) -> KindEfficiency:
        """What computes is bound by bytes in single steps only, so a prompt's time says nothing of its bandwidth; what
        does not has one curve over bytes, of which a step is the smallest."""
        single = next(point for point in found if point.new_tokens == 1)
        step = self._memory_share(single)
        if any(point.op.flops for point in found):
            memory = Curve((1.0,), (1.0, 16.0), ((step, 1.0),))
        else:
            prompt = {point.op.bytes: self._memory_share(point) for point in found if point.new_tokens > 1}
            memory = Curve.over(scaled({single.op.bytes: step} | prompt))
        compute = scaled({
            coordinates(point.op)[0]: self._share(point.op.flops / self.peaks.get(point.op.compute, 1.0), point.seconds)
            for point in found if point.op.flops
        })  # fmt: skip
        return KindEfficiency(
            compute=Curve.over(compute) if compute else Curve.constant(1.0),
            memory=memory,
            launch_seconds=launch,
        )

    def _memory_share(self, point: _Point) -> float:
        return self._share(point.op.bytes / self.peaks["bandwidth"], point.seconds)

    def step_constant(self, table: Efficiency) -> float:
        """What a forward call costs beyond its parts, on a model so small that it is nearly nothing else."""
        blocks = {"attention": _instance("attention", 4), "mlp": _instance("gated_mlp", 4)}
        spec = ModelSpec(name="tiny", hidden_size=256, vocab_size=1024, layers="2*(attention mlp)", blocks=blocks)
        model = build.model(spec, self.device, torch.bfloat16)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        spent = repeat(lambda: model(ids, logits_to_keep=1), self.device, seconds=0.5, least=5, most=100).low * 1e-3
        hardware = _as_hardware(self.peaks)
        foreseen = time_of(owned_work(spec, Request().step(1, 0)), table, hardware, 0).ms * 1e-3
        return max(10e-6, spent - foreseen)

    @staticmethod
    def _share(ideal: float, spent: float) -> float:
        return min(_NEVER, max(1e-6, ideal / spent))


@dataclass(frozen=True)
class _Point:
    """One op at one length: how long it seems to have taken."""

    new_tokens: int
    op: Op
    seconds: float


@dataclass(frozen=True)
class _Rest:
    """A sublayer's operations: seconds of those that are known, and the others with what they should take."""

    known: float
    own: list[tuple[Op, float]]
    count: int


def _rest(table: Efficiency, spec: ModelSpec, step: Step, found: dict[str, float], left_out_flops: float) -> _Rest:
    """What a sublayer's time is made of when products worth `left_out_flops` were not run."""
    known, products, product_flops, own, count = 0.0, 0.0, 0.0, [], 0
    for _, op in sublayer_work(spec, "block", step):
        curves = table.of(op)
        rate = found.get(op.compute, found["fp32"])
        spent = seconds(op, curves, rate, found["bandwidth"])
        if op.kind == "gemm":
            products += (spent + curves.launch_seconds) * op.count
            product_flops += op.flops * op.count
        elif op.kind == "attention":
            known += (spent + curves.launch_seconds) * op.count
        else:
            own.append((op, spent))
            count += op.count
    run = max(0.0, 1.0 - left_out_flops / product_flops) if product_flops else 0.0
    return _Rest(known + products * run, own, count)


@contextmanager
def without_products() -> Iterator[list[float]]:
    """Linear layers give ordinary numbers at once instead of multiplying; counts the FLOPs they leave out."""
    done: list[float] = [0.0]
    pools: dict[torch.dtype, torch.Tensor] = {}

    def forward(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], layer.out_features)
        size = math.prod(shape)
        done[0] += 2.0 * size * layer.in_features
        if x.dtype not in pools or pools[x.dtype].numel() < size:
            pools[x.dtype] = torch.randn(size, device=x.device).mul_(0.1).to(x.dtype)
        return pools[x.dtype][:size].view(shape)

    with patch.object(Linear, "forward", forward):
        yield done


def _levelled(values: list[float]) -> list[float]:
    """Each value as the median of itself and its neighbours: what is left of a difference is noisy."""
    return [median(values[max(0, index - 1) : index + 2]) for index in range(len(values))]


def _never_falling(times: dict[tuple[int, int], float]) -> None:
    """More rows or a larger weight never take less time; noise that says so is levelled."""
    for rows_index, rows in enumerate(ROWS):
        for size_index, size in enumerate(ELEMENTS):
            before = [times[ROWS[rows_index - 1], size]] if rows_index else []
            before += [times[rows, ELEMENTS[size_index - 1]]] if size_index else []
            times[rows, size] = max([times[rows, size], *before])


def _attention_op(new: int, keys: int, key_heads: int, name: str) -> Op:
    step = Request(precision=name).step(new, keys - new)
    work = _instance("attention", 16, key_heads).work(1024, step)
    return next(op for op in work if op.kind == "attention")


def _instance(kind: str, heads: int, key_heads: int = 4) -> Block:
    if kind == "attention":
        return known_blocks()[kind].model_validate(
            {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 64}
        )
    return known_blocks()[kind].model_validate({"intermediate_size": 512})


def _alone(block: Block, width: int) -> ModelSpec:
    """A model of nothing but this block."""
    return ModelSpec(name="alone", hidden_size=width, vocab_size=64, layers="block", blocks={"block": block})


def _typical() -> Iterator[tuple[Block, int]]:
    """Every block of the registry that has an instance of ordinary size, and its width."""
    data = json.loads(files("archcompass.profiles").joinpath("data/typical.json").read_text(encoding="utf-8"))
    known = known_blocks()
    for kind, entry in data["blocks"].items():
        if kind in known:
            fields = {name: value for name, value in entry.items() if name != "width"}
            yield known[kind].model_validate(fields), int(entry["width"])


def _as_hardware(found: dict[str, float]) -> Hardware:
    return Hardware(
        id="here", name="here", memory_bytes=2**62, memory_gb=0, is_cpu=True,
        bandwidth_bytes_per_second=found["bandwidth"], flops={k: v for k, v in found.items() if k != "bandwidth"},
    )  # fmt: skip


def _machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from archcompass.profiles.hardware import find

    return f"{find('cpu').name}, {torch.get_num_threads()} threads"


def _made(device: torch.device, left_out: list[str]) -> dict[str, Any]:
    """Versions and date; nothing that names the host."""
    from archcompass import __version__

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "archcompass": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _machine_name(device),
        "threads": torch.get_num_threads(),
        "clock": "process CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "left_out": left_out,
    }
