"""The delta rule and the selective scan on this CPU, against what they are made of and what they replace.

    python benchmarks/cpu_delta_scan.py [--rounds 15] [--threads 2 1] [--output benchmarks/results/cpu_delta_scan.json]

For a Gated DeltaNet layer and a Mamba-1 layer (width 768, 2048 tokens) it times the layer, its floor (projections and
convolution alone), the operation inside, and the same operation as a loop over tokens; a single step against the
matrix-vector products it cannot do without; and, with one thread, both operations through torch.compile. Candidates take
turns, round by round, so that a busy machine slows all of them alike, and the heap keeps what is freed, so that no pages are
mapped anew during one of them. Medians of wall time and of processor time are kept, and the least processor time. With one
thread the ratios are of processor time, which other programs disturb less; on a busy machine believe those of the least.
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
from torch import Tensor
from torch.nn.functional import normalize, softplus

from archcompass.blocks.base import Block
from archcompass.blocks.gated_delta_net.spec import GatedDeltaNet
from archcompass.blocks.mamba.spec import Mamba
from archcompass.blocks.runtime import initialise
from archcompass.kernels.conv import causal_conv
from archcompass.kernels.delta_rule import delta_rule, delta_rule_step
from archcompass.kernels.selective_scan import selective_scan, selective_scan_step
from archcompass.profiles.cpu import this_cpu
from archcompass.profiles.measure import heap

WIDTH, TOKENS, STEPS = 768, 2048, 100
DELTA = GatedDeltaNet(num_key_heads=6, num_value_heads=12, key_head_dim=128, value_head_dim=128)
MAMBA = Mamba(intermediate_size=1536, state_size=16, time_step_rank=48)
SLOW = {"token loop", "token loop, materialised"}  # timed in the first rounds only

Run = Callable[[], object]


def layer_and_floor(spec: Block, channels: int, dtype: torch.dtype) -> dict[str, Run]:
    """The whole layer, and the parts of it that are not the operation."""
    module = spec.build(WIDTH)
    initialise(module)
    module = module.to(dtype).eval()
    x = torch.randn(1, TOKENS, WIDTH, dtype=dtype)
    linears = [child for child in module.modules() if isinstance(child, torch.nn.Linear)]
    inputs = [torch.randn(1, TOKENS, linear.in_features, dtype=dtype) for linear in linears]
    columns = torch.randn(1, TOKENS, channels, dtype=dtype)

    def floor() -> None:
        for linear, given in zip(linears, inputs, strict=True):
            linear(given)
        causal_conv(columns, module.conv_weight, activation="silu")

    return {"layer": lambda: module(x), "floor": floor}


def delta_candidates(dtype: torch.dtype) -> dict[str, Run]:
    """Gated DeltaNet, 6 key heads and 12 value heads of 128."""
    keys, heads = (1, TOKENS, 6, 128), (1, TOKENS, 12)
    q, k = (normalize(torch.randn(keys), dim=-1).to(dtype) for _ in range(2))
    v, beta, log_decay = torch.randn(*heads, 128, dtype=dtype), torch.rand(heads), -0.1 * torch.rand(heads)
    return layer_and_floor(DELTA, DELTA.conv_channels, dtype) | {
        "operation": lambda: delta_rule(q, k, v, beta, log_decay),
        "token loop": lambda: delta_rule(q, k, v, beta, log_decay, backend="reference"),
    }


def scan_candidates(dtype: torch.dtype) -> dict[str, Run]:
    """Mamba-1 with 1536 channels of 16 entries (mamba-130m)."""
    x, dt = torch.randn(1, TOKENS, 1536, dtype=dtype), softplus(torch.randn(1, TOKENS, 1536) - 4).to(dtype)
    B, C = (torch.randn(1, TOKENS, 16, dtype=dtype) for _ in range(2))
    A = -torch.arange(1.0, 17.0).expand(1536, 16).contiguous()
    return layer_and_floor(MAMBA, 1536, dtype) | {
        "operation": lambda: selective_scan(x, dt, A, B, C),
        "token loop": lambda: selective_scan(x, dt, A, B, C, backend="reference"),
        "token loop, materialised": lambda: materialised_loop(x, dt, A, B, C),
    }


def materialised_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Every factor and input first, [batch, channels, time, N], then a loop: how Mamba-1 is usually run without kernels."""
    x, dt, B, C = (tensor.float() for tensor in (x, dt, B, C))
    factors = (A[None, :, None, :] * dt.mT[..., None]).exp()
    written = dt.mT[..., None] * B[:, None] * x.mT[..., None]
    state, outputs = factors.new_zeros(factors.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        state = factors[:, :, t] * state + written[:, :, t]
        outputs.append((state @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1)


def step_candidates(dtype: torch.dtype) -> dict[str, Run]:
    """A hundred single steps of each operation, and the reading products of the delta rule's state alone."""
    q, k = (normalize(torch.randn(1, 6, 128), dim=-1).to(dtype) for _ in range(2))
    v, beta, log_decay = torch.randn(1, 12, 128, dtype=dtype), torch.rand(1, 12), -0.1 * torch.rand(1, 12)
    state, pair = torch.zeros(1, 12, 128, 128), torch.randn(1, 12, 2, 128)
    x, dt, B = torch.randn(1, 1536, dtype=dtype), torch.rand(1, 1536).to(dtype), torch.randn(1, 16, dtype=dtype)
    A, entries = -torch.rand(1536, 16), torch.zeros(1, 1536, 16)

    def repeat(run: Run) -> Run:
        return lambda: [run() for _ in range(STEPS)]

    return {
        "operation": repeat(lambda: delta_rule_step(q, k, v, beta, log_decay, state=state)),
        "matrix-vector products": repeat(lambda: pair @ state),
        "selective scan step": repeat(lambda: selective_scan_step(x, dt, A, B, B, state=entries)),
    }


def compiled_candidates(dtype: torch.dtype) -> dict[str, Run]:
    """Both operations as they are and through torch.compile, over fewer tokens: every chunk is compiled by itself."""
    time, delta, scan = 512, torch.compile(delta_rule), torch.compile(selective_scan)
    q, k = (normalize(torch.randn(1, time, 6, 128), dim=-1).to(dtype) for _ in range(2))
    v, beta, log_decay = (
        torch.randn(1, time, 12, 128, dtype=dtype),
        torch.rand(1, time, 12),
        -torch.rand(1, time, 12) / 10,
    )
    x, dt = torch.randn(1, time, 1536, dtype=dtype), softplus(torch.randn(1, time, 1536) - 4).to(dtype)
    B, A = torch.randn(1, time, 16, dtype=dtype), -torch.arange(1.0, 17.0).expand(1536, 16).contiguous()
    return {
        "delta rule": lambda: delta_rule(q, k, v, beta, log_decay),
        "delta rule, compiled": lambda: delta(q, k, v, beta, log_decay),
        "selective scan": lambda: selective_scan(x, dt, A, B, B),
        "selective scan, compiled": lambda: scan(x, dt, A, B, B),
    }


def measured(candidates: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and processor milliseconds of each candidate; they take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            if name in SLOW and turn > 2:
                continue
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first round warms caches and threads
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: {
            "wall_ms": round(1e3 * median(wall for wall, _ in taken), 3),
            "processor_ms": round(1e3 * median(processor for _, processor in taken), 3),
            "least_processor_ms": round(1e3 * min(processor for _, processor in taken), 3),
        }
        for name, taken in times.items()
    }


def ratios(taken: dict[str, dict[str, float]], clock: str) -> dict[str, float]:
    """What the numbers are for."""
    wanted = {
        "layer_over_floor": ("layer", "floor"),
        "token_loop_over_operation": ("token loop", "operation"),
        "materialised_loop_over_operation": ("token loop, materialised", "operation"),
        "step_over_matrix_vector_products": ("operation", "matrix-vector products"),
        "compiled_over_delta_rule": ("delta rule, compiled", "delta rule"),
        "compiled_over_selective_scan": ("selective scan, compiled", "selective scan"),
    }
    return {
        name: round(taken[one][clock] / taken[other][clock], 2)
        for name, (one, other) in wanted.items()
        if one in taken and other in taken
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu_delta_scan.json")
    options = parser.parse_args()
    makers = {"gated delta net": delta_candidates, "mamba": scan_candidates, "hundred steps": step_candidates}
    compiled = {"512 tokens, compiled": compiled_candidates}
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = "processor_ms" if threads == 1 else "wall_ms"
        for dtype in (torch.float32, torch.bfloat16):
            for case, make in (makers | (compiled if threads == 1 else {})).items():
                torch.manual_seed(0)
                with torch.no_grad(), heap.held():
                    taken = measured(make(dtype), options.rounds)
                row = {"case": case, "dtype": str(dtype)[6:], "threads": threads, "ratios_of": clock}
                row |= {"ratios": ratios(taken, clock), "ratios_of_least": ratios(taken, "least_processor_ms")}
                rows.append(row | {"taken": taken})
                print(json.dumps(rows[-1]), flush=True)
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": this_cpu().name,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"width": WIDTH, "tokens": TOKENS, "batch": 1},
        "rounds": options.rounds,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
