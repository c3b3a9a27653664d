"""A single step of each block on this CPU, against the matrix-vector products it cannot do without.

    python benchmarks/cpu_steps.py [--rounds 15] [--threads 1 2] [--output benchmarks/results/cpu_steps.json]

For the ordinary instance of each block, after 64 tokens: one token through the block; the same with its matrices
laid by columns, as `LanguageModel.for_decoding` lays them; and torch's `linear` with every matrix a token meets, and one
read of the recurrent state in float32, alone. The three take turns, once with one block over and over, whose matrices
then lie in the caches, and once with as many in a row as a model has layers, from memory. Medians; with one thread of
processor time.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from archcompass.blocks.base import Block, known_blocks
from archcompass.blocks.layout import lay_by_columns
from archcompass.blocks.runtime import BlockModule, Context, initialise
from archcompass.profiles.cpu import this_cpu

KINDS = ("mamba2", "mamba", "gated_delta_net", "kimi_delta", "rwkv7_time_mix", "attention", "gated_mlp", "moe")
PAST, STEPS, SMALLEST_SIDE = 64, 20, 16
FROM_MEMORY_BYTES, MOST_LAYERS = 192 << 20, 64  # of the layers that take turns; no cache here holds them

Run = Callable[[], object]


def candidates(spec: Block, width: int, dtype: torch.dtype, layers: int) -> dict[str, Run]:
    """A step, a step of the module laid out for decoding, and the products alone, each of the next of so many layers."""
    plain, laid = ([built(spec, width, dtype) for _ in range(layers)] for _ in range(2))
    for module in laid:
        lay_by_columns(module)
    return {
        "step": in_turn([one_token(module, width, dtype) for module in plain]),
        "step, by columns": in_turn([one_token(module, width, dtype) for module in laid]),
        "matrix-vector products": in_turn([products(spec, width, module) for module in plain]),
    }


def in_turn(runs: list[Run]) -> Run:
    following = itertools.cycle(runs)
    return lambda: next(following)()


def depth(spec: Block, width: int, dtype: torch.dtype) -> int:
    """Layers whose matrices leave the caches."""
    layer_bytes = sum(matrix.nbytes for matrix in matrices(built(spec, width, dtype)))
    return min(MOST_LAYERS, -(-FROM_MEMORY_BYTES // layer_bytes))


def built(spec: Block, width: int, dtype: torch.dtype) -> BlockModule:
    torch.manual_seed(0)
    module = spec.build(width)
    initialise(module)
    return module.to(dtype).eval()


def matrices(module: BlockModule) -> list[torch.nn.Parameter]:
    """What a token is multiplied by: [out, in], or [experts, out, in]."""
    return [p for p in module.parameters() if p.ndim > 1 and min(p.shape[-2:]) >= SMALLEST_SIDE]


def one_token(module: BlockModule, width: int, dtype: torch.dtype) -> Run:
    prompt, x = torch.randn(1, PAST, width, dtype=dtype), torch.randn(1, 1, width, dtype=dtype)
    _, state = module(prompt, None, Context(room=1))
    before = None if state is None else state.copy()
    return lambda: module(x, before, Context(past=PAST, room=1))


def products(spec: Block, width: int, module: BlockModule) -> Run:
    met: list[torch.Tensor] = []
    for matrix in matrices(module):
        met += [matrix] if matrix.ndim == 2 else matrix[: getattr(spec, "num_experts_per_tok", 1)].unbind()
    pairs = [(torch.randn(1, matrix.shape[1], dtype=matrix.dtype), matrix) for matrix in met]
    states = [torch.randn(tensor.shape) for tensor in spec.state(width, PAST) if tensor.name == "recurrent"]
    reads = [(torch.randn(*state.shape[:-2], 1, state.shape[-2]), state) for state in states if state.ndim == 3]

    def run() -> None:
        for x, matrix in pairs:
            F.linear(x, matrix)
        for rows, state in reads:
            torch.bmm(rows, state)

    return run


def microseconds(runs: dict[str, Run], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Medians of one call each, which take turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            for _ in range(STEPS):
                run()
            if turn:  # the first round warms caches and threads
                taken[name].append((clock() - started) / STEPS * 1e6)
    return {name: round(median(values), 1) for name, values in taken.items()}


def main() -> None:
    """Measures every block and writes one row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu_steps.json")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        for dtype in (torch.float32, torch.bfloat16):
            for kind in KINDS:
                ordinary = known_blocks()[kind].typical()
                assert ordinary is not None, kind
                spec, width = ordinary
                for layers in (1, depth(spec, width, dtype)):
                    with torch.inference_mode():
                        taken = microseconds(candidates(spec, width, dtype, layers), options.rounds, clock)
                    floor = taken["matrix-vector products"]
                    over = {name: round(value / floor, 2) for name, value in taken.items() if value is not floor}
                    row = {"block": kind, "width": width, "dtype": str(dtype)[6:], "threads": threads, "layers": layers}
                    rows.append(row | {"microseconds": taken, "over_products": over})
                    print(json.dumps(rows[-1]), flush=True)
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": this_cpu().name,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "rounds": options.rounds,
    }
    options.output.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
