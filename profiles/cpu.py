"""The processor this program runs on, as a `Hardware`: what the operating system says, without torch.

Rates are estimates from the instruction set until `calibrate` or a probe has measured them; `source` says which.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

from archcompass.profiles.hardware import Hardware
from archcompass.profiles.units import GB

# fp32 operations a core ends per cycle with fused multiply-add, by the widest vector unit the flags name.
_FP32_PER_CYCLE = (("avx512f", 64), ("avx2", 32), ("asimd", 16), ("sse2", 8))

# Sustained bytes per second one core draws from memory, an ordinary figure of servers and laptops of the 2020s.
_BANDWIDTH_PER_CORE = 12e9
_BANDWIDTH_CEILING = 80e9


@cache
def this_cpu() -> Hardware:
    """This machine's processor. Memory is what the machine (or its control group) has, less one gigabyte for the system."""
    info = _cpuinfo()
    cores = threads()
    flags = set(info.get("flags", info.get("Features", "")).split())
    hertz = _clock_hertz(info)
    fp32 = cores * hertz * next((n for flag, n in _FP32_PER_CYCLE if flag in flags), 8)
    widened = 2.0 if {"avx512_bf16", "amx_bf16", "bf16"} & flags else 0.5
    memory = memory_bytes()
    return Hardware(
        id="cpu",
        name=info.get("model name", platform.processor() or platform.machine() or "processor"),
        vendor=info.get("vendor_id", ""),
        kind="cpu",
        memory_bytes=max(memory - GB, memory // 2),
        memory_gb=round(memory / GB, 1),
        bandwidth_bytes_per_second=min(cores * _BANDWIDTH_PER_CORE, _BANDWIDTH_CEILING),
        flops={"fp32": fp32, "bf16": fp32 * widened, "fp16": fp32 * 0.5},
        is_cpu=True,
        architecture=_generation(info),
        source=f"estimated from {cores} threads at {hertz / 1e9:.2f} GHz and their instruction set",
        confidence="estimate; archcompass calibrate measures it",
    )


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def threads() -> int:
    """Threads that torch will use: OMP_NUM_THREADS where it is set, else one a core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(wanted)) if wanted.isdigit() else usable_cores()


def memory_bytes() -> int:
    """Memory of the machine, or of the control group that holds this process when that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GB
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(whole, int(limit)) if limit.isdigit() else whole


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor that the kernel lists; empty where there is no such file."""
    pairs = re.findall(r"^([\w ]+?)\s*:\s*(.*)$", _read("/proc/cpuinfo").split("\n\n")[0], re.MULTILINE)
    return dict(pairs)


def _generation(info: dict[str, str]) -> str:
    """Instruction set, family and model: what tells two processors apart that a virtual machine calls by one name."""
    numbers = [f"{field.split()[-1]} {info[field]}" for field in ("cpu family", "model") if field in info]
    return " ".join([platform.machine(), *numbers])


def _clock_hertz(info: dict[str, str]) -> float:
    listed = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if listed.isdigit():
        return float(listed) * 1e3
    return float(info.get("cpu MHz", "2500")) * 1e6


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
