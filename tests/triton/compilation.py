"""Runs in a process of its own: every Triton kernel compiled for GPUs that are not here, against its budget."""

import os
from collections import defaultdict
from pathlib import Path

import pytest
from support.budget import compiled, faults
from support.cases import compilations, first_calls, meta

from archcompass.kernels.aot import compiling

FIRST_CALLS = first_calls()
BATCHES_AND_LENGTHS = ((1, 1), (2, 17), (3, 64), (1, 100), (16, 4096), (2, 65536))
MANY = ((70000, 1), (1, 2**20))
CASES = {name: case for name, case in compilations().items() if case.short}
# Set by test_modes.py: the smallest shared memory on sale, and Hopper.
CAPABILITIES = [int(name) for name in os.environ.get("ARCHCOMPASS_CAPABILITIES", "86,90").split(",")]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_within_its_budget(name: str, capability: int) -> None:
    case = CASES[name]
    if case.only and capability not in case.only:
        pytest.skip("not a GPU of this case")
    assert not faults(case, compiled(case, capability))


@pytest.mark.parametrize("name", FIRST_CALLS)
def test_the_first_call_is_bounded_and_later_lengths_compile_nothing_new(name: str) -> None:
    """Kernels specialise on the model's sizes, on alignment, on a row of a tile table, and never on batch or time."""
    variants = defaultdict(set)
    with compiling(CAPABILITIES[0]) as done:
        for batch, time in BATCHES_AND_LENGTHS:
            FIRST_CALLS[name].launch(meta, batch, time)
    for kernel in done:
        variants[kernel.kernel].add(kernel.key)
    assert variants
    most = FIRST_CALLS[name].most
    assert {kernel: len(keys) for kernel, keys in variants.items() if len(keys) > most.get(kernel, 1)} == {}


@pytest.mark.parametrize(("batch", "time"), MANY)
@pytest.mark.parametrize("name", FIRST_CALLS)
def test_no_grid_ends_where_a_batch_or_a_prompt_does_not(name: str, batch: int, time: int) -> None:
    with compiling(CAPABILITIES[0]) as done:
        FIRST_CALLS[name].launch(meta, batch, time)
    assert [(kernel.kernel, kernel.grid) for kernel in done if not kernel.launches] == []


def test_every_operation_bounds_its_first_call() -> None:
    kernels = Path(__file__).parent.parent.parent / "kernels"
    assert {name.partition("-")[0] for name in FIRST_CALLS} == {path.parent.name for path in kernels.glob("*/op.py")}
