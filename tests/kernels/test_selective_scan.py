"""The selective scan: blocks equal the formula, in whole, in pieces, packed, and with exact gradients."""

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import InputError
from archcompass.kernels.selective_scan import (
    explain,
    exponentials,
    selective_scan,
    selective_scan_cost,
    selective_scan_step,
)
from archcompass.kernels.selective_scan.blocked import selective_scan_torch

Inputs = dict[str, Any]
ALONG_TIME = ("x", "dt", "B", "C", "gate")


def scan_inputs(
    *,
    batch: int = 2,
    time: int = 75,
    channels: int = 6,
    entries: int = 5,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """`shift` moves dt before its softplus: -10 for a decay that vanishes, 300 for one that is total."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    inputs = {
        "x": normal(batch, time, channels),
        "dt": softplus(normal(batch, time, channels) + shift),
        "A": -normal(channels, entries).exp(),
        "B": normal(batch, time, entries),
        "C": normal(batch, time, entries),
        "D": normal(channels),
        "gate": normal(batch, time, channels),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def cut(inputs: Inputs, index: Any) -> Inputs:
    return {name: x[:, index] if name in ALONG_TIME else x for name, x in inputs.items()}


def assert_equal(mine: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    for actual, expected in zip(mine, right, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("backend", "time"), [("reference", 4), ("torch", 34)])
def test_gradients_are_those_of_the_formula(backend: Any, time: int) -> None:
    inputs = scan_inputs(batch=1, time=time, channels=3, entries=2)
    state = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), initial_state=state, backend=backend)

    assert torch.autograd.gradcheck(run, (state, *(x.requires_grad_() for x in inputs.values())))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_skip_and_gate_are_those_of_the_paper(backend: Any) -> None:
    inputs, h = scan_inputs(time=5), torch.zeros(2, 6, 5, dtype=torch.float64)
    x, dt, A, B, C, D, gate = inputs.values()
    expected = []
    for t in range(5):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        expected.append(((h * C[:, t, None]).sum(-1) + D * x[:, t]) * gate[:, t] * gate[:, t].sigmoid())
    assert_equal(selective_scan(**inputs, backend=backend), (torch.stack(expected, dim=1), h))


@pytest.mark.parametrize("time", [2, 31, 32, 33, 75])
def test_blocks_equal_the_formula_in_outputs_states_and_gradients(time: int) -> None:
    results = []
    for backend in ("reference", "torch"):
        inputs = {name: x.requires_grad_() for name, x in scan_inputs(time=time).items()}
        state = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
        out, last = selective_scan(**inputs, initial_state=state, backend=backend)
        loss = (out * torch.randn_like(out)).sum() + (last * torch.randn_like(last)).sum()
        results.append((out, last, *torch.autograd.grad(loss, [state, *inputs.values()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_segments_and_single_steps_equal_the_whole() -> None:
    inputs = scan_inputs(time=40)
    whole = selective_scan(**inputs)
    state, outputs = None, []
    for start, end in ((0, 7), (7, 8), (8, 8), (8, 40)):
        out, state = selective_scan(**cut(inputs, slice(start, end)), initial_state=state)
        outputs.append(out)
    assert_equal((torch.cat(outputs, dim=1), state), whole)
    with torch.no_grad():
        state, outputs = torch.zeros_like(state), []
        for t in range(40):
            out, stepped = selective_scan_step(**cut(inputs, t), state=state)
            assert stepped.data_ptr() == state.data_ptr(), "decoding writes the state in place"
            outputs.append(out)
    assert_equal((torch.stack(outputs, dim=1), state), whole)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_equal_separate_ones(backend: Any) -> None:
    inputs, bounds = scan_inputs(batch=1, time=50), [0, 0, 1, 20, 20, 50]
    state = torch.randn(5, 6, 5, dtype=torch.float64)
    packed = selective_scan(**inputs, initial_state=state, cu_seqlens=torch.tensor(bounds), backend=backend)
    pairs = [
        selective_scan(**cut(inputs, slice(start, end)), initial_state=state[n : n + 1], backend=backend)
        for n, (start, end) in enumerate(pairwise(bounds))
    ]
    assert_equal(packed, (torch.cat([out for out, _ in pairs], dim=1), torch.cat([last for _, last in pairs])))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_empty_sequence_keeps_its_state(backend: Any) -> None:
    state = torch.randn(2, 6, 5, dtype=torch.float64)
    out, last = selective_scan(**scan_inputs(time=0), initial_state=state, backend=backend)
    assert out.shape == (2, 0, 6)
    assert torch.equal(last, state)


@pytest.mark.parametrize("shift", [-10.0, 0.0, 300.0], ids=["vanishing", "usual", "total"])
def test_any_decay_is_safe_in_float32(shift: float) -> None:
    exact = selective_scan(**scan_inputs(shift=shift), backend="reference")
    leaves = {name: x.requires_grad_() for name, x in scan_inputs(shift=shift, dtype=torch.float32).items()}
    out, state = selective_scan(**leaves)
    assert relative_error(out.detach(), exact[0]) < 2e-6
    assert relative_error(state.detach(), exact[1]) < 2e-6
    gradients = torch.autograd.grad(out.sum() + state.sum(), list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_bfloat16_inputs_of_large_scale_err_no_more_than_their_rounding() -> None:
    inputs = scan_inputs(dtype=torch.bfloat16)
    inputs["x"] = inputs["x"] * 1e4
    exact = selective_scan(**{name: x.double() for name, x in inputs.items()}, backend="reference")
    out, state = selective_scan(**inputs)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(out, exact[0]) < torch.finfo(torch.bfloat16).eps
    assert relative_error(state, exact[1]) < 1e-5


def test_a_float32_state_does_not_drift_over_64k_steps() -> None:
    """Weak decay: dt A is about -5e-5, so the state remembers tens of thousands of tokens."""
    inputs = scan_inputs(batch=1, time=65536, channels=2, entries=2, shift=-10.0)
    exact = selective_scan(**inputs)
    out, state = selective_scan(**{name: x.float() for name, x in inputs.items()})
    assert relative_error(out[:, -1000:], exact[0][:, -1000:]) < 1e-4
    assert relative_error(state, exact[1]) < 1e-4


@pytest.mark.parametrize("time", [1, 2, 64])
def test_flops_are_what_the_counter_counts(time: int) -> None:
    inputs = {name: x.to("meta") for name, x in scan_inputs(time=time).items()}
    with FlopCounterMode(display=False) as counter:
        selective_scan(**inputs)
    cost = selective_scan_cost(batch=2, new_tokens=time, channels=6, state_dim=5, element_bytes=8)
    assert cost.flops == counter.get_total_flops()


def test_the_registered_formula_equals_the_products_that_really_run() -> None:
    """The operator hides its products from the counter, so its formula is held to the python body, run in the open."""
    inputs = scan_inputs(time=64)
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    with FlopCounterMode(display=False) as counter:
        selective_scan_torch._init_fn(dt * x, dt, A, B, C, torch.zeros(2, 6, 5, dtype=torch.float64), False)
    assert (
        counter.get_total_flops()
        == selective_scan_cost(batch=2, new_tokens=64, channels=6, state_dim=5, element_bytes=8).flops
    )


def test_exponentials_are_one_per_channel_entry_and_token() -> None:
    assert exponentials(batch=2, new_tokens=3, channels=5, state_dim=7) == 2 * 3 * 5 * 7


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    inputs = scan_inputs(batch=1, time=5, channels=3, entries=2)
    x, dt, A, B, C = (inputs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C"))
    state = torch.zeros(1, 3, 2, dtype=torch.float64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(selective_scan_torch, (x, dt, A, B, C, state, True), test_utils=tests)


def test_it_compiles_to_one_graph() -> None:
    inputs = scan_inputs(dtype=torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**inputs), selective_scan(**inputs), tolerance=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(6, 5)}, "A is positive somewhere"),
        ({"A": -torch.ones(7, 5)}, r"A \[7, 5\]"),
        ({"dt": torch.ones(2, 75, 1)}, "dt has shape"),
        ({"C": torch.ones(2, 75, 4)}, "C has shape"),
        ({"D": torch.ones(5)}, "D has shape"),
        ({"gate": torch.ones(2, 74, 6)}, "gate has shape"),
        ({"initial_state": torch.zeros(2, 5, 6)}, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 75])}, "packed sequences need a batch of 1, not 2"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Inputs, message: str) -> None:
    with pytest.raises(InputError, match=message):
        selective_scan(**{**scan_inputs(), **change})


def test_the_choice_of_backend_is_data() -> None:
    inputs = scan_inputs()
    choice = explain(inputs["x"], inputs["A"])
    assert choice.backend == "torch"
    assert "triton" in choice.rejected


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_gpu_operator_has_shapes_flops_and_gradients_without_a_gpu() -> None:
    from archcompass.kernels.selective_scan.triton_scan import selective_scan_triton

    inputs = {name: x.float().to("meta").requires_grad_() for name, x in scan_inputs(time=64).items()}
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    state = torch.zeros(2, 6, 5, device="meta")
    with FlopCounterMode(display=False) as counter:
        y, last = selective_scan_triton(x, dt, A, B, C, None, None, state, None, train=True)
        forward = counter.get_total_flops()
        gradients = torch.autograd.grad(y.sum() + last.sum(), [x, dt, A, B, C])
    assert forward == selective_scan_cost(batch=2, new_tokens=64, channels=6, state_dim=5, element_bytes=4).flops
    assert counter.get_total_flops() == 4 * forward
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in (x, dt, A, B, C)]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_segments_cut_every_sequence_of_a_batch_without_a_gap() -> None:
    from archcompass.kernels.selective_scan.triton_scan import _token_table

    bounds, slots, kept = _token_table(torch.zeros(2, 70, 3), 3)
    assert bounds.tolist() == [0, 32, 64, 70, 102, 134, 140]
    assert slots.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert kept == 6
    bounds, slots, kept = _token_table(torch.zeros(1, 70, 3), 1)
    assert (bounds.tolist(), slots.tolist(), kept) == ([0, 70], [0, 3], 3)
