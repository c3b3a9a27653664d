"""Experts and attention on the CPU against what torch offers, in one run: medians of interleaved calls.

    python benchmarks/cpu_moe_attention.py [--threads 1] [--seconds 1] [--clock cpu] [--only experts] [--write]

Experts: against a loop over experts that looks its tokens up (the form most model code has), a loop over sorted rows, and
torch's grouped_mm; nine routings take turns. Attention: against one call of scaled_dot_product_attention that says the same,
with a mask where it needs one. Our time is divided by the best of the others; below 1 we are faster. The heap keeps what is
freed meanwhile. `--write` keeps the result, with machine and versions, in benchmarks/results/cpu_moe_attention.json.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, scaled_dot_product_attention, silu

from archcompass.kernels.attention import attention, latent_attention
from archcompass.kernels.moe import moe_mlp, route
from archcompass.profiles.measure import heap

RESULT = Path(__file__).resolve().parent / "results" / "cpu_moe_attention.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = (torch.float32, torch.bfloat16)
FEWEST, MOST = 3, 200  # rounds
ROUTINGS = 9  # a few tokens may meet many experts or few, side by side or apart
Calls = dict[str, Callable[[], object]]
Routing = tuple[Tensor, Tensor]

# tokens, experts, chosen, hidden, inner
EXPERTS = [(2048, 32, 4, 768, 512), (2048, 128, 8, 768, 256), (16, 32, 4, 768, 512), (1, 32, 4, 768, 512)]
# name, batch, new, keys, heads, kv heads, width, window
ATTENTION: list[tuple[str, int, int, int, int, int, int, int | None]] = [
    ("prompt", 1, 2048, 2048, 12, 4, 64, None),
    ("prompt, window 256", 1, 2048, 2048, 12, 4, 64, 256),
    ("segment of 512 after 1536", 1, 512, 2048, 12, 4, 64, None),
    ("step, 4 sequences", 4, 1, 2048, 32, 8, 128, None),
    ("step, window 1024", 1, 1, 4096, 16, 4, 128, 1024),
]


def expert_calls(x: Tensor, routes: list[Routing], gate_up: Tensor, down: Tensor) -> Calls:
    """Ours and three others, on the same tensors, each call with the next of the routings."""
    count = gate_up.shape[0]

    def expert(rows: Tensor, index: int) -> Tensor:
        gate, up = linear(rows, gate_up[index]).chunk(2, dim=-1)
        return linear(silu(gate) * up, down[index])

    def looked_up(weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index in range(count):
            token, slot = torch.where(chosen == index)
            if len(token):
                y.index_add_(0, token, expert(x[token], index) * weights[token, slot, None])
        return y

    def sorted_rows(weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = chosen.flatten().argsort(stable=True)
        return (
            order // chosen.shape[1],
            weights.flatten()[order, None],
            torch.bincount(chosen.flatten(), minlength=count),
        )

    def sorted_loop(weights: Tensor, chosen: Tensor) -> Tensor:
        token, scale, counts = sorted_rows(weights, chosen)
        parts = zip(x[token].split(counts.tolist()), range(count), strict=True)
        return torch.zeros_like(x).index_add_(0, token, torch.cat([expert(r, i) for r, i in parts if len(r)]) * scale)

    def grouped(weights: Tensor, chosen: Tensor) -> Tensor:
        token, scale, counts = sorted_rows(weights, chosen)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends) * scale
        return torch.zeros_like(x).index_add_(0, token, rows)

    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda weights, chosen: moe_mlp(x, weights, chosen, gate_up, down),
        "loop over experts": looked_up,
        "loop over sorted rows": sorted_loop,
        "torch grouped_mm": grouped,
    }
    return {name: partial(_with_next, call, cycle(routes)) for name, call in calls.items()}


def _with_next(call: Callable[[Tensor, Tensor], Tensor], routes: Iterator[Routing]) -> Tensor:
    return call(*next(routes))


def routed(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> Routing:
    """Weights and experts of every token, by chance."""
    weights, chosen = route(torch.randn(tokens, experts), top_k)
    return weights.to(dtype), chosen


def expert_cases() -> Iterator[tuple[str, Calls]]:
    """Forward of every shape, and one forward with backward."""
    for dtype in DTYPES:
        for tokens, experts, top_k, hidden, inner in EXPERTS:
            x, gate_up = torch.randn(tokens, hidden).to(dtype), torch.randn(experts, 2 * inner, hidden).to(dtype) / 30
            down = torch.randn(experts, hidden, inner).to(dtype) / 30
            routes = [routed(tokens, experts, top_k, dtype) for _ in range(ROUTINGS)]
            name = f"experts {experts} choose {top_k}, {hidden}-{inner}, {tokens} tokens, {str(dtype)[6:]}"
            yield name, expert_calls(x, routes, gate_up, down)
            if tokens > 1000 and experts < 100:
                # Routing weights too: without their gradient a router learns nothing.
                leaves = [t.requires_grad_() for t in (x, routes[0][0], gate_up, down)]
                calls = expert_calls(x, routes[:1], gate_up, down)
                yield name + ", with backward", {k: _with_backward(call, leaves) for k, call in calls.items()}


def _with_backward(call: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call().sum(), leaves)


def attention_cases() -> Iterator[tuple[str, Calls]]:
    """Ours and plain SDPA on the same tensors."""
    for dtype in DTYPES:
        for name, batch, new, keys, heads, kv_heads, width, window in ATTENTION:
            q, k, v = (
                torch.randn(batch, time, count, width).to(dtype)
                for time, count in ((new, heads), (keys, kv_heads), (keys, kv_heads))
            )
            yield (
                f"{name}, {heads}/{kv_heads} x {width}, {str(dtype)[6:]}",
                {
                    "ours": lambda q=q, k=k, v=v, window=window: attention(q, k, v, window=window),
                    "SDPA": _plain(q, k, v, window),
                },
            )
        q, latents = torch.randn(1, 1, 16, 576).to(dtype), torch.randn(1, 4096, 576).to(dtype)
        yield (
            f"latent step, 16 heads, 512 + 64, 4096 keys, {str(dtype)[6:]}",
            {
                "ours": lambda q=q, latents=latents: latent_attention(q, latents, 512, scale=0.1),
                "SDPA": _latent(q, latents),
            },
        )


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Callable[[], object]:
    new, keys, grouped = q.shape[1], k.shape[1], q.shape[2] > k.shape[2]
    if new == 1 and window is not None:
        k, v = k[:, -window:], v[:, -window:]
    position, key = torch.arange(keys - new, keys)[:, None], torch.arange(keys)
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    causal = new == keys and window is None
    mask = None if causal or new == 1 else visible
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _latent(q: Tensor, latents: Tensor) -> Callable[[], object]:
    k = latents.unsqueeze(1)
    q = q.transpose(1, 2)
    return lambda: scaled_dot_product_attention(q, k, k[..., :512], scale=0.1, enable_gqa=True)


def interleaved_ms(calls: Calls, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each call; they take turns in changing order, so that a slow moment meets them all and
    none of them always finds the caches as the same other one left them. Calls that at
    first take thrice the time of the best are then made a few times only."""
    shuffle = random.Random(0).shuffle
    for call in calls.values():
        call()
    first = {name: _ms(call, time.perf_counter) for name, call in calls.items()}
    slow = {name for name, ms in first.items() if ms > 3 * min(first.values())}
    rounds = int(1e3 * seconds / sum(ms for name, ms in first.items() if name not in slow))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(FEWEST, min(rounds, MOST))):
        order = [name for name in calls if turn < FEWEST or name not in slow]
        shuffle(order)
        for name in order:
            times[name].append(_ms(calls[name], clock))
    return {name: round(median(values), 4) for name, values in times.items()}


def _ms(call: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return (clock() - started) * 1e3


def machine() -> dict[str, Any]:
    """What ran this."""
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "")
    return {
        "cpu": model or platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Runs every case and prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of one case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: time of this process, on a shared machine"
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for cases in (expert_cases, attention_cases):
        for name, calls in cases():
            if options.only not in name:
                continue
            with torch.set_grad_enabled(name.endswith("backward")), heap.held():
                ms = interleaved_ms(calls, options.seconds, CLOCKS[options.clock])
            best = min(value for key, value in ms.items() if key != "ours")
            rows.append({"case": name, "ms": ms, "ours_to_best": round(ms["ours"] / best, 3)})
            print(f"{ms['ours'] / best:6.2f}  {name}  {ms}", flush=True)
    if options.write:
        RESULT.parent.mkdir(exist_ok=True)
        kept = {
            "machine": machine(),
            "clock": options.clock,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": options.seconds,
            "rows": rows,
        }
        RESULT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
