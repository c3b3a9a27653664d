"""Runs in a process of its own: every Triton kernel compiled for GPUs that are not here, against its budget."""

import os

import pytest
import torch
from support.budget import compiled, faults
from support.cases import compilations, meta

from archcompass.kernels.aot import compiling
from archcompass.kernels.linear_attention import triton_op
from archcompass.kernels.norm import triton_norm

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


def test_the_first_call_is_bounded_and_later_lengths_compile_nothing_new() -> None:
    """Kernels specialise on the model's sizes, on alignment, and never on batch or time."""
    with compiling(CAPABILITIES[0]) as done:
        for batch, time in ((1, 1), (2, 17), (3, 64), (1, 100), (16, 4096), (2, 65536)):
            q, v = meta(batch, time, 1, 128), meta(batch, time, 32, 64)
            triton_op.forward(q, q, v, meta(batch, time, 32, dtype=torch.float32), None, None, False, 1.0)
            triton_norm.forward(v.flatten(2), meta(2048), None, v.flatten(2), 1e-5, True, False, 2048, False)
    variants = {
        kernel: len({one.key for one in done if one.kernel == kernel}) for kernel in {one.kernel for one in done}
    }
    assert variants == dict.fromkeys(variants, 1)
    assert len(variants) == 4
