"""The GPU benchmark where there is no GPU: every kind of case in Triton's interpreter, and what it does when things fail."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

FILE = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
ROOFS = {"matmul_tflops": 800.0, "copy_gb_s": 4000.0}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The command, and the names of its parts."""
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for part in ("case", "clock", "measure", "supervisor"):
        vars(module).update(vars(importlib.import_module(f"gpu_suite.{part}")))
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, "-P", str(FILE), *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class FakeClock:
    """Two milliseconds for us and three for anybody else, whatever is asked."""

    device = torch.device("cpu")

    def interleaved(self, runs: dict[str, object], seconds: float) -> dict[str, dict[str, float]]:
        return {name: {"ms": 2.0 if name == "ours" else 3.0} for name in runs}


def doubling(gpu: ModuleType, factor: float = 2.0, **more: object):
    """A case that doubles its input; its kernel multiplies by `factor`."""

    def call(backend: str, x: Tensor) -> Tensor:
        return x * (factor if backend == "triton" else 2.0)

    made = gpu.Case(
        operation="double", kind="forward", size="4 x 8", real={"rows": 4}, call=call, dtype=torch.float32,
        inputs=lambda make, shape: {"x": make.normal(shape["rows"], 8)}, work=lambda shape: gpu.Work(1.6e12, 4e6),
    )  # fmt: skip
    return replace(made, **more)


def measured(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, case: object) -> dict:
    """The last row of a case on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    *_, row = gpu.measured(case, FakeClock(), ROOFS, {"matmul_tflops": None, "copy_gb_s": None}, 0.1)
    return row


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kind_of_case_is_right_in_the_interpreter_and_none_is_timed() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == []
    operations = {row["operation"] for row in result["rows"]}
    kernels = {path.name for path in (FILE.parent.parent / "kernels").iterdir() if (path / "op.py").exists()}
    renamed = {"norm": "rms_norm", "conv": "causal_conv", "moe": "moe_mlp", "rope": "rotate"}
    assert {renamed.get(name, name) for name in kernels} <= operations
    assert all(row["ms"] is None and row["clock"] == "not measured" for row in result["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_a_row_carries_speed_shares_and_the_peer(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(gpu, monkeypatch, doubling(gpu, peers={"other": lambda x: x + x}))
    assert row["error"] is None
    assert (row["ms"], row["tflops"], row["gb_s"]) == (2.0, 800.0, 2.0)
    assert row["of_measured_roofline"] == {"share": 1.0, "bound": "products"}
    assert row["of_data_sheet"] == {"share": None, "bound": None}
    assert row["peers"]["other"]["peer_to_ours"] == 1.5
    assert row["first_call_s"] > 0
    assert "other 3, 1.50" in gpu.line_of(row)


def test_what_is_wrong_is_kept_and_not_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(gpu, monkeypatch, doubling(gpu, factor=2.001))
    assert row["ms"] is None
    assert row["error"].startswith("wrong, so not timed")


def test_a_wrong_gradient_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(backend: str, x: Tensor) -> Tensor:
        return 2.0 * x.detach() + 3.0 * (x - x.detach()) if backend == "triton" else 2.0 * x

    row = measured(gpu, monkeypatch, doubling(gpu, call=call, gradients=("x",)))
    assert row["error"].startswith("wrong, so not timed: result 1")


def test_a_peer_that_is_missing_or_wrong_leaves_a_note(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(x: Tensor) -> Tensor:
        raise ModuleNotFoundError("No module named 'absent'")

    row = measured(gpu, monkeypatch, doubling(gpu, peers={"absent": absent, "wrong": lambda x: 3 * x}))
    assert row["ms"] == 2.0
    assert row["peers"]["absent"]["note"].startswith("not here")
    assert "not timed" in row["peers"]["wrong"]["note"]
    assert row["peers"]["wrong"]["ms"] is None


WORKER = """
import json, os, sys
names = json.loads(sys.argv[1])
tell = lambda message: print("@row " + json.dumps(message), flush=True)
print("a library says something")
for name in names:
    tell({"begin": name})
    if "falls" in name:
        os._exit(7)
    if "hangs" in name:
        import time; time.sleep(60)
    tell({"row": {"case": name, "ms": None, "clock": "-", "error": "found " + name, "peers": {}}})
    tell({"end": name})
"""


def test_a_case_that_falls_or_hangs_takes_nobody_with_it(gpu: ModuleType) -> None:
    wanted = [doubling(gpu, size=size) for size in ("first", "falls", "hangs", "last")]
    rows = gpu.Supervisor(wanted, 1.0, 1.5, [sys.executable, "-c", WORKER]).run()
    assert [row["error"] for row in rows] == [
        "found double forward, first",
        "its process ended with 7",
        "stopped: it took too long",
        "found double forward, last",
    ]


def test_a_worker_that_cannot_start_and_time_that_is_up_are_told_in_every_row(gpu: ModuleType) -> None:
    wanted = [doubling(gpu, size=size) for size in ("first", "second")]
    broken = gpu.Supervisor(wanted, 1.0, 5.0, [sys.executable, "-c", "raise SystemExit(3)"]).run()
    assert [row["error"] for row in broken] == ["its process ended with 3"] * 2
    late = gpu.Supervisor(wanted, 0.0, 5.0, [sys.executable, "-c", WORKER]).run()
    assert [row["error"] for row in late] == ["not run: the time was up"] * 2


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Something Else", None),
    ],
)
def test_the_data_sheet_is_found_by_the_drivers_name(gpu: ModuleType, name: str, card: str | None) -> None:
    found = gpu.data_sheet(name)
    assert found["card"] == card
    assert (found["matmul_tflops"] is None) == (card is None)


def test_a_document_is_written_whole(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "new" / "gpu.json"
    gpu.hand_over(gpu.document("quick", [], {}), out)
    assert json.loads(out.read_text())["rows"] == []
    assert list(out.parent.iterdir()) == [out]


def test_names_are_unique_and_every_case_has_work_and_a_size_of_its_own(gpu: ModuleType) -> None:
    cases = gpu.cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        flops, size = case.work(case.real)
        assert flops >= 0
        assert size > 0
        assert {*case.check, *case.tiny} <= {*case.real}
