"""Memory really seen: what tensors of a call take at most, and what the process took of the machine.

On an accelerator the allocator says. On a processor every storage that an operation creates is followed until it dies, which
is exact for tensors and blind to workspaces inside one library call; the process's high-water mark sees those as well, and
everything else besides.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageWatch(TorchDispatchMode):
    """Follows every storage created while it is active.

    Attributes:
        looks_on: calls take the way they take without it (`archcompass.kernels.eager`).
        now_bytes: alive now, of those created under it.
        peak_bytes: the most that was alive at once.
    """

    looks_on = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_inputs = {
            value.untyped_storage()._cdata
            for value in tree_iter((args, kwargs or {}))
            if isinstance(value, torch.Tensor) and value.device.type != "meta"
        }
        run = self._inside if func.namespace == "archcompass" else _plainly
        result = run(func, args, kwargs or {})
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._follow(value, known_inputs)
        return result

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs one of our own operations, which are written in torch, with its inner operations in sight."""
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)

    def _follow(self, value: torch.Tensor, known_inputs: set[int]) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known or key in known_inputs:
            return
        self._known[key] = storage.nbytes()
        self.now_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now_bytes -= self._known.pop(key, 0)


def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def tensor_peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(the most alive at once, what is still alive after it) of tensors that `call` creates, its result kept."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak, left = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    else:
        with StorageWatch() as watch:
            result = call()
        peak, left = watch.peak_bytes, watch.now_bytes
    del result
    return peak, left


def reset_process_peak() -> bool:
    """Starts the process's high-water mark anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def process_peak_bytes() -> int | None:
    """The most physical memory this process held since `reset_process_peak`; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
