"""Time on one GPU, and what the device could do at best: by a probe of its own, and by its data sheet."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import median, quantiles

import torch

from gpu_suite.case import Work
from gpu_suite.row import Row, Run, rounded

CARDS = Path(__file__).resolve().parents[2] / "profiles" / "data" / "gpus.json"

ROUNDS = (7, 60)


class Clock:
    """Times calls on one GPU."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.flushed = torch.empty(max(4 * cache_bytes, 2**28), dtype=torch.int8, device=device)
        self.shuffle = random.Random(0).shuffle

    def once(self, run: Run) -> float:
        """Milliseconds of one call by events, the cache overwritten before it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def interleaved(self, runs: dict[str, Run], seconds: float) -> dict[str, Row]:
        """Median and quartiles in milliseconds of each; they take turns, in changing order."""
        for run in runs.values():
            run()
            run()
        guess = sum(self.once(run) for run in runs.values()) + 0.2 * len(runs)
        rounds = int(min(max(seconds * 1e3 / guess, ROUNDS[0]), ROUNDS[1]))
        times: dict[str, list[float]] = {name: [] for name in runs}
        order = list(runs.items())
        for _ in range(rounds):
            self.shuffle(order)
            for name, run in order:
                times[name].append(self.once(run))
        return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> Row:
    low, _, high = quantiles(values, n=4)
    return {"ms": rounded(median(values)), "low_ms": rounded(low), "high_ms": rounded(high), "runs": len(values)}


def recorded(run: Run) -> Run:
    """The call as a CUDA graph, without what launching takes.

    Raises:
        RuntimeError: it waits for the device, or does something else that a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    return graph.replay


def limits(work: Work, ms: float, tflops: float | None, bandwidth_gb_s: float | None) -> Row:
    """The share of a device's roofline, and which roof it is."""
    if not tflops or not bandwidth_gb_s:
        return {"share": None, "bound": None}
    by_products, by_memory = work.flops / tflops / 1e9, work.bytes / bandwidth_gb_s / 1e6
    bound = "products" if by_products > by_memory else "memory"
    return {"share": rounded(max(by_products, by_memory) / ms), "bound": bound}


def probe(clock: Clock) -> Row:
    """What this device reaches now: a large bfloat16 product, and a large copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(2**30, device=clock.device, dtype=torch.int8)
    target = torch.empty_like(source)
    found = clock.interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, seconds=0.6)
    return {
        "matmul_tflops": rounded(2 * 8192**3 / found["product"]["ms"] / 1e9),
        "copy_gb_s": rounded(2 * source.nbytes / found["copy"]["ms"] / 1e6),
    }


def data_sheet(name: str) -> Row:
    """Dense bfloat16 speed and bandwidth of a card by the name its driver gives, from the table that `profiles` keeps."""
    words = set(name.lower().replace("-", " ").replace("sxm4", "sxm").replace("hbm3", "sxm").split())
    words |= {word.removesuffix("gb") for word in words}
    cards = json.loads(CARDS.read_text(encoding="utf-8"))["gpus"] if CARDS.exists() else []
    fitting = [card for card in cards if set(card["id"].split("-")) <= words and "bf16" in card["tflops"]]
    if not fitting or "laptop" in words:
        return {"card": None, "matmul_tflops": None, "copy_gb_s": None}
    card = max(fitting, key=lambda card: len(card["id"]))
    return {"card": card["id"], "matmul_tflops": card["tflops"]["bf16"], "copy_gb_s": card["bandwidth_gb_s"]}


def device_facts(device: torch.device) -> Row:
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name, "compute_capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count, "l2_bytes": found.L2_cache_size, "cuda": torch.version.cuda,
    }  # fmt: skip
