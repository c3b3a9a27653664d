"""Compiles Triton kernels for GPUs that are not there, and reads what the binary needs.

A driver that only knows its target is put in Triton's place, and every launch becomes a compilation. So the real
host code, called on meta tensors, compiles exactly the variants a GPU would run: types, divisibility by 16, absent
pointers and block sizes are derived as at a launch. Not possible in a process that runs Triton's interpreter.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archcompass.errors import BackendError
from archcompass.kernels.dispatch import interpreting
from archcompass.kernels.tiles import SHARED_KIB, assume

TARGETS = (80, 86, 89, 90, 100, 120)
LARGEST_GRID = (
    2**31 - 1,
    65535,
    65535,
)  # CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"

# The instruction that feeds the tensor cores: mma.sync up to Ada and again on consumer Blackwell, one of its own on
# Hopper and on data centre Blackwell.
TENSOR_CORE_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One compiled variant of one kernel: what it needs of a streaming multiprocessor.

    `key` tells variants apart; `options` are its block sizes, warps and stages. `spill_bytes` is the stack frame of a
    thread, which is spilled registers and local arrays. `shared_limit_bytes` is what the target offers to one block.
    `grid` is that of the launch.
    """

    kernel: str
    key: str
    capability: int
    options: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    tensor_core_instructions: int
    compile_seconds: float
    grid: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether shared memory suffices for a launch; a kernel above the limit compiles all the same."""
        return self.shared_bytes <= self.shared_limit_bytes

    @property
    def launches(self) -> bool:
        """Whether CUDA takes the grid: 2^31 - 1 programs one way, 65535 the other two."""
        return all(0 < n <= most for n, most in zip(self.grid, LARGEST_GRID, strict=False))


class _AbsentGpu:
    """What Triton asks of a driver when it compiles and does not launch."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"absent-sm{self.target.arch}"  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Inside, Triton launches compile for this compute capability; yields the list of what was compiled.

    Raises:
        BackendError: this process runs Triton's interpreter.
    """
    if interpreting():
        raise BackendError("kernels cannot be compiled in a process that interprets them; unset TRITON_INTERPRET")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    done: list[Compiled] = []
    launch, before = JITFunction.run, driver._active

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        started = time.perf_counter()
        built = launch(kernel, *args, grid=grid, warmup=True, **options)
        built = built.result() if hasattr(built, "result") else built
        done.append(_read(kernel, built, capability, options, time.perf_counter() - started, tuple(grid)))

    driver.set_active(_AbsentGpu(capability))
    JITFunction.run = compile_only
    try:
        with assume(capability):
            yield done
    finally:
        JITFunction.run = launch
        driver._active = before


def _read(
    kernel: Any, built: Any, capability: int, options: dict[str, Any], seconds: float, grid: tuple[int, ...]
) -> Compiled:
    registers, stack = _registers_and_stack(built.asm["cubin"])
    shown = {name: value for name, value in options.items() if isinstance(value, (int, str))}
    return Compiled(
        kernel=kernel.fn.__name__,
        key=built.hash,
        capability=capability,
        options=" ".join(f"{name}={value}" for name, value in shown.items()),
        registers=registers,
        spill_bytes=stack,
        shared_bytes=built.metadata.shared,
        shared_limit_bytes=SHARED_KIB[capability] * 1024,
        tensor_core_instructions=len(TENSOR_CORE_INSTRUCTION.findall(built.asm["ptx"])),
        compile_seconds=seconds,
        grid=grid,
    )


def _registers_and_stack(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as the disassembler that comes with Triton reads them."""
    import triton

    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(reader), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], max(found["STACK"], found["LOCAL"])
