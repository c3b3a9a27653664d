"""Starts the Triton checks, each in a process of its own: Triton interprets or compiles, never both in one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def assert_passes(file: str, **environment: str) -> None:
    """Runs one of the two files under pytest; fails with the end of what it printed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)],
        env={**inherited, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("half", ["0", "1"])
def test_kernels_agree_with_torch_in_the_interpreter(half: str) -> None:
    assert_passes("agreement.py", TRITON_INTERPRET="1", ARCHCOMPASS_HALF=half)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["86", "90"])
def test_kernels_compile_for_gpus_that_are_not_here(capability: str) -> None:
    assert_passes("compilation.py", ARCHCOMPASS_CAPABILITIES=capability)
