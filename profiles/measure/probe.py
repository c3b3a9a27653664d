"""A short look at a processor: its peak products and the bandwidth of its memory, in about a second."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from archcompass.profiles.hardware import Hardware
from archcompass.profiles.measure.clock import repeat

_SIDE = 1024
_POOL_BYTES = 256 * 2**20


@cache
def peaks(device_name: str = "cpu") -> dict[str, float]:
    """FLOP/s by dtype of products of 1024 x 1024, and "bandwidth": bytes per second read by the sum of 256 MiB."""
    device = torch.device(device_name)
    found = {}
    with torch.inference_mode():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            left, right = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
            times = repeat(lambda left=left, right=right: left @ right, device, seconds=0.15, least=3)  # type: ignore[misc]
            found[name] = 2.0 * _SIDE**3 / (min(times.runs) * 1e-3)
        pool = torch.ones(_POOL_BYTES // 4, device=device)
        times = repeat(lambda: pool.sum(), device, seconds=0.2, least=3)
    found["bandwidth"] = _POOL_BYTES / (min(times.runs) * 1e-3)
    return found


def probed(hardware: Hardware, device_name: str = "cpu") -> Hardware:
    """`hardware` with the figures this machine really reaches, in the place of estimates."""
    seen = peaks(device_name)
    flops = dict(hardware.flops) | {"fp32": seen["fp32"], "bf16": seen["bf16"], "fp16": min(seen["fp32"], seen["bf16"])}
    return replace(
        hardware,
        flops=flops,
        bandwidth_bytes_per_second=seen["bandwidth"],
        source="probed: products of 1024 x 1024 and a sum over 256 MiB",
        confidence="measured here",
    )
