"""What starting one kernel costs on an accelerator: one by one from the host, and replayed from a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from archcompass.profiles.measure.clock import synchronise

KERNELS = 200


def launches(device: torch.device) -> dict[str, float]:
    """Seconds of a kernel among many that do next to nothing: "eager" and "graph". Empty on a processor: it launches none."""
    if device.type != "cuda":
        return {}
    x = torch.zeros(64, device=device)

    def chain() -> None:
        for _ in range(KERNELS):
            x.add_(1.0)

    return {"eager": _each(chain, device), "graph": _each(_captured(chain), device)}


def _captured(chain: Callable[[], None]) -> Callable[[], None]:
    """`chain` recorded once, and replayed whole; warmed up on a stream of its own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return graph.replay


def _each(chain: Callable[[], None], device: torch.device) -> float:
    """The least of several runs from start to end, by kernel; the host's clock, since it is the host that is slow."""
    runs = []
    for _ in range(7):
        synchronise(device)
        start = time.perf_counter()
        chain()
        synchronise(device)
        runs.append(time.perf_counter() - start)
    return min(runs[1:]) / KERNELS
