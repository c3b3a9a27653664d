"""What a kernel must show: the three kinds of table entry, and where they are found.

Every module of `cases/` may define `AGREEMENTS`, `COMPILATIONS` and `FIRST_CALLS`. README.md says how to write one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CASES = Path(__file__).parent.parent / "cases"
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A call whose Triton result, run by the interpreter, must be as good as torch's in the same dtype.

    Args:
        name: a name of its own, without blanks.
        inputs: makes the tensors, in float64, by name; None stays None.
        call: the public operation, called as `call(backend=..., **inputs)`; returns a tensor or a tuple of tensors.
        float32: inputs that stay float32 whatever the dtype under test (gates, states).
        gradients: inputs whose gradients are compared too.
        dtypes: dtypes under test.
        slack: how many times the error of same-dtype torch is allowed; 2, unless a comment says why.
    """

    name: str
    inputs: Callable[[], Mapping[str, Tensor | None]]
    call: Callable[..., Any]
    float32: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    slack: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """Host code that launches kernels; called on meta tensors, it compiles them for GPUs that are not there.

    Args:
        name: a name of its own, without blanks.
        launch: the host code, called as `launch(meta)` where `meta(*shape, dtype=torch.bfloat16)` makes a tensor.
        dots: the kernels among those launched that must use tensor cores.
        spill_bytes: the stack a kernel may use per thread, by "kernel" or by "kernel@90"; 0 where nothing is said.
        only: compute capabilities it is for; () is all.
        short: whether it is part of the test suite, which compiles for two GPUs; all belong to `make kernels-aot`.
    """

    name: str
    launch: Callable[[Callable[..., Tensor]], object]
    dots: frozenset[str] = frozenset()
    spill_bytes: Mapping[str, int] = field(default_factory=dict)
    only: tuple[int, ...] = ()
    short: bool = True


@dataclass(frozen=True, kw_only=True)
class FirstCall:
    """One model at several batches and lengths, which must not compile its kernels anew for each of them.

    Args:
        name: a name of its own, without blanks.
        launch: the host code, called as `launch(meta, batch, time)`.
        most: variants that a kernel may have over all of them; 1 where nothing is said.
    """

    name: str
    launch: Callable[[Callable[..., Tensor], int, int], object]
    most: Mapping[str, int] = field(default_factory=dict)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def agreements() -> dict[str, Agreement]:
    """Every agreement there is, by family and name."""
    return dict(_collect("AGREEMENTS"))


def compilations() -> dict[str, Compilation]:
    """Every compilation there is, by family and name."""
    return dict(_collect("COMPILATIONS"))


def first_calls() -> dict[str, FirstCall]:
    """Every first call there is, by family and name."""
    return dict(_collect("FIRST_CALLS"))


def _collect(table: str) -> Iterator[tuple[str, Any]]:
    for path in sorted(CASES.glob("*.py")):
        spec = spec_from_file_location(f"triton_cases_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        for case in getattr(module, table, ()):
            yield f"{path.stem}-{case.name}", case
