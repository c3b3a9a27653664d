"""Measures what this machine reaches: products by shape and dtype, memory, attention, every block, every launch.

A table of efficiencies comes out (see `profiles.efficiency`): efficiency = roofline time / measured time. Products and
attention are measured alone (`products`), what else a block does inside it (`parts`), backward passes last (`training`).
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from archcompass.blocks.base import Block, known_blocks
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.efficiency import ACCELERATOR, PROCESSOR, Efficiency
from archcompass.profiles.hardware import BOUNDLESS, Hardware, find
from archcompass.profiles.measure import build, heap
from archcompass.profiles.measure.launches import launches
from archcompass.profiles.measure.model import Progress, silent
from archcompass.profiles.measure.parts import MEASURED_ALONE, Parts, apart, beside
from archcompass.profiles.measure.probe import peaks
from archcompass.profiles.measure.products import TOKENS, Products, instance
from archcompass.profiles.measure.training import optimizer, training
from archcompass.profiles.predict import owned_work, time_of
from archcompass.profiles.request import Request

# Eight of ten measured times over their predictions, each by a single calibration, whether the machine was calm or busy with
# other work (`range_of_one_visit` of benchmarks/accuracy.py).
SPREAD = {"prefill": (0.85, 1.3), "decode": (0.7, 1.55)}


@heap.held()
def calibrate(
    device: str = "cpu",
    *,
    progress: Progress = silent,
    budget_seconds: float = 150.0,
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
    blocks: Collection[str] | None = None,
) -> Efficiency:
    """This machine's table.

    Args:
        device: "cpu" or "cuda".
        progress: told how far it is.
        budget_seconds: blocks that would begin after it are left out, and the table says which.
        dtypes: which of "bf16" and "fp32" to measure, the first as the one that serves all others.
        blocks: only these kinds of block; None measures all.

    Raises:
        InputError: no such device.
    """
    place = build.device_of(device)
    bench = _Bench(place, time.perf_counter() + budget_seconds, progress, dtypes, blocks)
    with torch.inference_mode():
        return bench.run()


@dataclass
class _Bench:
    """One calibration: what it measures on, until when, and what it has found."""

    device: torch.device
    deadline: float
    progress: Progress
    dtypes: tuple[str, ...]
    chosen: Collection[str] | None
    left_out: list[str] = field(default_factory=list)

    def run(self) -> Efficiency:
        self.progress(0.0, "peaks of products and memory")
        self.peaks = peaks(str(self.device))
        base = ACCELERATOR if self.device.type == "cuda" else PROCESSOR
        kinds = dict(base.kinds)
        for number, name in enumerate(self.dtypes):
            products = Products(self.device, self.peaks, name)
            at = number / len(self.dtypes)
            self.progress(0.02 + 0.3 * at, f"matrix products in {name}")
            kinds[f"gemm:{name}"] = products.gemm()
            self.progress(0.02 + 0.3 * (at + 0.4 / len(self.dtypes)), f"products of experts in {name}")
            kinds[f"grouped_gemm:{name}"] = products.grouped()
            self.progress(0.02 + 0.3 * (at + 0.7 / len(self.dtypes)), f"attention in {name}")
            kinds[f"attention:{name}"] = products.attention()
        kinds |= {kind: kinds[f"{kind}:{self.dtypes[0]}"] for kind in MEASURED_ALONE}
        table = Efficiency(
            name=_machine_name(self.device),
            source="calibrated",
            kinds=kinds,
            layer_seconds=0.0,
            step_seconds=0.0,
            overlaps=base.overlaps,
            launches=launches(self.device),
            peaks=self.peaks,
            spread=SPREAD,
        )
        table = self.blocks(table)
        constant = self.step_constant(table)
        return replace(table, step_seconds=constant, made=_made(self.device, self.left_out))

    def blocks(self, table: Efficiency) -> Efficiency:
        """`table` with the operations of every block, and what they cost in training."""
        done: dict[str, list[tuple[Block, int]]] = {name: [] for name in self.dtypes}
        wanted = [(b, width) for b, width in _typical() if self.chosen is None or b.kind in self.chosen]
        todo = [(name, block, width) for name in self.dtypes for block, width in wanted]
        for index, (name, block, width) in enumerate(todo):
            self.progress(0.32 + 0.5 * index / len(todo), f"{block.kind} in {name}")
            if time.perf_counter() > self.deadline:
                self.left_out.append(f"{block.kind} in {name}")
                continue
            found = Parts(self.device, table, name, self.lengths(name)).block(block, width)
            table = replace(table, kinds={**table.kinds, **found})
            done[name].append((block, width))
        for number, (name, blocks) in enumerate(done.items()):
            self.progress(0.82 + 0.15 * number / len(done), f"training in {name}")
            table = self.training(table, name, blocks)
        return table

    def lengths(self, name: str) -> tuple[int, ...]:
        """Of prompts. From 512 tokens on a processor's pace changes by a tenth at most: its second dtype is spared them."""
        return TOKENS if name == self.dtypes[0] or self.device.type == "cuda" else TOKENS[:-1]

    def training(self, table: Efficiency, name: str, blocks: list[tuple[Block, int]]) -> Efficiency:
        """`table` with backward passes and the optimizer in one dtype."""
        kinds = {**table.kinds, f"optimizer/optimizer:{name}": optimizer(self.device, table, name)}
        factors = training(self.device, table, name, blocks, self.deadline)
        self.left_out += [f"{b.kind} in {name}, training" for b, _ in blocks if f"{b.kind}:{name}" not in factors]
        return replace(table, kinds=kinds, training={**table.training, **factors})

    def step_constant(self, table: Efficiency) -> float:
        """What a forward call costs beyond its parts, on a model so small that it is nearly nothing else."""
        blocks = {"attention": instance("attention", 4), "mlp": instance("gated_mlp", 4)}
        spec = ModelSpec(name="tiny", hidden_size=256, vocab_size=1024, layers="2*(attention mlp)", blocks=blocks)
        model = build.model(spec, self.device, torch.bfloat16)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with apart(self.device, evict_from=0 if self.device.type == "cpu" else None) as products:
            spent = beside(lambda: model(ids, logits_to_keep=1), products, self.device, most=100)
        work = [(owner, op) for owner, op in owned_work(spec, Request().step(1, 0)) if op.kind != "gemm"]
        return max(10e-6, spent - time_of(work, table, _as_hardware(self.peaks), 0).ms * 1e-3)


def _typical() -> Iterator[tuple[Block, int]]:
    """Every block of the registry that has an instance of ordinary size, and its width."""
    for kind in known_blocks().values():
        typical = kind.typical()
        if typical is not None:
            yield typical


def _as_hardware(found: dict[str, float]) -> Hardware:
    return Hardware(
        id="here", name="here", memory_bytes=BOUNDLESS, memory_gb=0, is_cpu=True,
        bandwidth_bytes_per_second=found["bandwidth"], flops={k: v for k, v in found.items() if k != "bandwidth"},
    )  # fmt: skip


def _machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{find('cpu').name}, {threads} thread{'s' if threads > 1 else ''}"


def _made(device: torch.device, left_out: list[str]) -> dict[str, Any]:
    """Versions and date, and what was expected of a processor before it was measured; nothing that names the host."""
    from archcompass import __version__

    made = {
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
    return made if device.type == "cuda" else made | _as_estimated(find("cpu"))


def _as_estimated(processor: Hardware) -> dict[str, Any]:
    """What another processor is compared by, see `tables.borrowed`."""
    estimates = dict(processor.flops) | {"bandwidth": processor.bandwidth_bytes_per_second}
    return {"machine": platform.machine(), "vendor": processor.vendor, "estimates": estimates}
