"""A Mamba-2 layer on this CPU, against what it is made of and what it replaces.

    python benchmarks/cpu_layers.py [--rounds 15] [--threads 2 1] [--output benchmarks/results/cpu_layers.json]

Times the layer (width 768, 24 heads of 64, 128 rows of state, 2048 tokens), its floor (projections and convolution
alone), its linear attention alone, as a loop over tokens, and compiled by torch; then a single step of the layer
against the matrix-vector products it cannot do without. Candidates take turns, round by round, so that a busy machine
slows all of them alike, and the heap keeps what is freed. Medians of wall time and of processor time are kept; with one
thread the ratios are of processor time, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.runtime import initialise
from archcompass.kernels.conv import causal_conv
from archcompass.kernels.linear_attention import linear_attention
from archcompass.profiles.cpu import this_cpu
from archcompass.profiles.measure import heap

WIDTH, TOKENS, STEPS = 768, 2048, 100
LAYER = Mamba2(num_heads=24, head_dim=64, state_size=128)
SLOW = {"token loop"}  # timed in the first rounds only

Run = Callable[[], object]


def prompt_candidates(dtype: torch.dtype, with_compiler: bool) -> dict[str, Run]:
    """The whole layer on a prompt, and its parts."""
    module = LAYER.build(WIDTH)
    initialise(module)
    module = module.to(dtype).eval()
    x = torch.randn(1, TOKENS, WIDTH, dtype=dtype)
    inner = torch.randn(1, TOKENS, LAYER.inner_width, dtype=dtype)
    q, k = (torch.randn(1, TOKENS, 1, LAYER.state_size, dtype=dtype) for _ in range(2))
    v = torch.randn(1, TOKENS, LAYER.num_heads, LAYER.head_dim, dtype=dtype)
    log_decay = -0.1 * torch.rand(1, TOKENS, LAYER.num_heads)
    inner_width, conved = LAYER.inner_width, LAYER.conv_channels

    def floor() -> None:
        projected = module.input(x)
        causal_conv(
            projected[..., inner_width : inner_width + conved], module.conv_weight, module.conv_bias, activation="silu"
        )
        module.output(inner)

    candidates: dict[str, Run] = {
        "layer": lambda: module(x),
        "floor": floor,
        "operation": lambda: linear_attention(q, k, v, log_decay),
        "token loop": lambda: linear_attention(q, k, v, log_decay, backend="reference"),
    }
    if with_compiler:
        compiled = torch.compile(linear_attention)
        candidates["operation, compiled"] = lambda: compiled(q, k, v, log_decay)
    return candidates


def step_candidates(dtype: torch.dtype) -> dict[str, Run]:
    """A hundred tokens one by one through the layer, and through its matrix-vector products alone."""
    module = LAYER.build(WIDTH)
    initialise(module)
    module = module.to(dtype).eval()
    x, inner = torch.randn(1, 1, WIDTH, dtype=dtype), torch.randn(1, 1, LAYER.inner_width, dtype=dtype)
    _, state = module(x)
    rows, states = torch.randn(24, 1, 128), torch.randn(24, 128, 64)

    def steps() -> None:
        for _ in range(STEPS):
            module(x, state)

    def products() -> None:
        for _ in range(STEPS):
            F.linear(x, module.input.weight)
            torch.bmm(rows, states)
            F.linear(inner, module.output.weight)

    return {"steps": steps, "matrix-vector products": products}


def measured(candidates: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and processor milliseconds of each candidate; they take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            if name in SLOW and turn > 2:
                continue
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first round warms caches, threads and the compiler
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: {
            "wall_ms": round(1e3 * median(w for w, _ in taken), 2),
            "processor_ms": round(1e3 * median(p for _, p in taken), 2),
        }
        for name, taken in times.items()
    }


def ratios(taken: dict[str, dict[str, float]], clock: str) -> dict[str, float]:
    """What the numbers are for."""
    wanted = {
        "layer_over_floor": ("layer", "floor"),
        "token_loop_over_operation": ("token loop", "operation"),
        "compiled_over_operation": ("operation, compiled", "operation"),
        "step_over_matrix_vector_products": ("steps", "matrix-vector products"),
    }
    return {
        name: round(taken[one][clock] / taken[other][clock], 2)
        for name, (one, other) in wanted.items()
        if one in taken and other in taken
    }


def main() -> None:
    """Runs every case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu_layers.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = "processor_ms" if threads == 1 else "wall_ms"
        for dtype in (torch.float32, torch.bfloat16):
            cases = {
                "mamba-2 prompt": lambda dtype=dtype, one=threads == 1: prompt_candidates(dtype, one),
                "mamba-2 hundred steps": lambda dtype=dtype: step_candidates(dtype),
            }
            for case, make in cases.items():
                torch.manual_seed(0)
                with torch.no_grad(), heap.held():
                    taken = measured(make(), options.rounds)
                row = {"case": case, "dtype": str(dtype)[6:], "threads": threads, "ratio_of": clock}
                rows.append(row | ratios(taken, clock) | {"median": taken})
                print(json.dumps(rows[-1]), flush=True)
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": this_cpu().name,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"width": WIDTH, "tokens": TOKENS, "batch": 1, "heads": 24, "head_dim": 64, "state_size": 128},
        "rounds": options.rounds,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
