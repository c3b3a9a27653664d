"""Runs in a process of its own: every Triton kernel compiled for GPUs that are not here, against its budget."""

import os

import pytest
from support.budget import compiled, faults
from support.cases import compilations

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
