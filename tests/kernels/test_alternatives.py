"""What each backend of each operation has to do, and the least time a machine takes for it."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from archcompass.kernels import dispatch
from archcompass.kernels.cost import Cost, Machine
from archcompass.kernels.dispatch import FASTEST_FIRST, choose

OPERATIONS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/op.py"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_states_the_work_of_each_backend(operation: str) -> None:
    cost = import_module(f"archcompass.kernels.{operation}.cost")
    work = cost.alternatives(**cost.EXAMPLE)
    assert tuple(work) == FASTEST_FIRST
    machine = Machine(flops_per_second=1e15, bytes_per_second=3e12)
    times = [machine.milliseconds(cost) for cost in work.values()]
    assert min(times) > 0
    assert min(times[:2]) <= times[2], "the formula never does less than both that stand in for it"


def test_time_is_that_of_the_slower_roof() -> None:
    machine = Machine(flops_per_second=1e12, bytes_per_second=1e9)
    assert machine.milliseconds(Cost(10**9, 10**5)) == pytest.approx(1.0)
    assert machine.milliseconds(Cost(10**9, 10**6, 10**6)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("capability", "hip", "obstacle"),
    [((9, 0), None, None), ((7, 5), None, "compute capability 7.5"), ((9, 4), "6.4", "ROCm")],
)
def test_kernels_run_only_where_they_were_compiled_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, obstacle: str | None
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: capability if n else (9, 0))
    found = dispatch._obstacle.__wrapped__("cuda")
    assert found is None if obstacle is None else obstacle in str(found)


def test_a_choice_carries_the_prediction_of_its_alternatives() -> None:
    chosen = choose("example", "auto", torch.device("cpu"))
    assert chosen.predicted_ms == {}
    work = {"torch": Cost(10**9, 0), "reference": Cost(0, 10**9)}
    timed = chosen.predicted(work, Machine(flops_per_second=1e12, bytes_per_second=1e11))
    assert (timed.backend, timed.reason) == (chosen.backend, chosen.reason)
    assert timed.predicted_ms == pytest.approx({"torch": 1.0, "reference": 10.0})
