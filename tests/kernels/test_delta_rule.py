"""The delta rule: matrix products equal the formula, in whole, in pieces, packed, and with gradients."""

import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import BackendError, InputError
from archcompass.kernels.decay import vector_decayed_scores
from archcompass.kernels.delta_rule import (
    delta_rule,
    delta_rule_cost,
    delta_rule_step,
    dplr,
    dplr_cost,
    dplr_step,
    explain,
)

DECAYS = ("none", "scalar", "vector")
Inputs = dict[str, Any]


def uniform(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).to(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def delta_inputs(
    decay: str,
    *,
    batch: int = 2,
    time: int = 75,
    key_heads: int = 2,
    heads: int = 4,
    key_dim: int = 60,
    value_dim: int = 100,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Unit keys and betas up to 2; `strength` scales the log decay."""
    torch.manual_seed(0)
    key_heads = heads if decay == "vector" and key_heads > heads else key_heads
    keys = (batch, time, key_heads, key_dim)
    gates = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}[decay]
    return {
        "q": normalize(normal(*keys), dim=-1).to(dtype),
        "k": normalize(normal(*keys), dim=-1).to(dtype),
        "v": normal(batch, time, heads, value_dim, dtype=dtype),
        "beta": 2 * uniform(batch, time, heads, dtype=dtype),
        "log_decay": None if gates is None else -strength * uniform(*gates, dtype=dtype),
    }


def dplr_inputs(
    *,
    batch: int = 2,
    time: int = 75,
    heads: int = 3,
    key_dim: int = 60,
    value_dim: int = 100,
    strength: float = 0.6,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """As RWKV-7 calls it: a takes out what b, a fraction of the same unit vector, puts back."""
    torch.manual_seed(1)
    keys = (batch, time, heads, key_dim)
    removal = normalize(normal(*keys), dim=-1)
    return {
        "q": normal(*keys, dtype=dtype),
        "k": 0.3 * normal(*keys, dtype=dtype),
        "v": normal(batch, time, heads, value_dim, dtype=dtype),
        "a": -removal.to(dtype),
        "b": (removal * uniform(*keys)).to(dtype),
        "log_decay": -strength * uniform(*keys, dtype=dtype),
    }


def cut(inputs: Inputs, start: int, end: int) -> Inputs:
    return {name: None if x is None else x[:, start:end] for name, x in inputs.items()}


def token(inputs: Inputs, t: int) -> Inputs:
    return {name: None if x is None else x[:, t] for name, x in inputs.items()}


CASES = [
    pytest.param(delta_rule, delta_rule_step, lambda kind=kind, **k: delta_inputs(kind, **k), id=kind)
    for kind in DECAYS
]
CASES.append(pytest.param(dplr, dplr_step, dplr_inputs, id="dplr"))
over_operations = pytest.mark.parametrize(("operation", "step", "make"), CASES)


def assert_equal(mine: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    for actual, expected in zip(mine, right, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@over_operations
def test_the_reference_has_the_gradients_of_its_formula(operation: Any, step: Any, make: Any) -> None:
    inputs = make(batch=1, time=3, heads=2, key_dim=3, value_dim=2)
    names = [name for name, x in inputs.items() if x is not None]
    state = normal(1, 2, 3, 2).requires_grad_()

    def run(state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        call = dict(inputs, **dict(zip(names, tensors, strict=True)))
        return operation(**call, initial_state=state, backend="reference")

    assert torch.autograd.gradcheck(run, (state, *(inputs[name].requires_grad_() for name in names)))


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_a_few_heads_may_decay_too_strongly_for_the_rest(precision: torch.dtype) -> None:
    """One head in eight is past what two factors can express, inside one chunk; another comes close to it."""
    inputs = delta_inputs("scalar", batch=1, heads=8, key_dim=12, value_dim=10)
    log_decay = inputs["log_decay"]
    assert log_decay is not None
    log_decay[:, 20:30, 5], log_decay[:, 10:20, 2] = -25.0, -8.0
    exact = delta_rule(**inputs, backend="reference")
    leaves = {name: x.to(precision).requires_grad_() for name, x in inputs.items() if x is not None}
    out, state = delta_rule(**leaves, backend="torch")
    tolerance = 1e-10 if precision == torch.float64 else 1e-4
    assert_equal((out.double(), state.double()), exact, tolerance)
    mine = torch.autograd.grad(out.square().sum() + state.square().sum(), list(leaves.values()))
    again = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
    out, state = delta_rule(**again, backend="reference")
    right = torch.autograd.grad(out.square().sum() + state.square().sum(), list(again.values()))
    assert all(relative_error(one, other) <= tolerance for one, other in zip(mine, right, strict=True))


@over_operations
@pytest.mark.parametrize("time", [2, 16, 17, 75])
def test_chunks_equal_the_formula_in_outputs_states_and_gradients(
    operation: Any, step: Any, make: Any, time: int
) -> None:
    results = []
    for backend in ("reference", "torch"):
        inputs = make(time=time)
        heads = inputs["v"].shape[2]
        torch.manual_seed(2)
        state = normal(2, heads, 60, 100).requires_grad_()
        leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
        out, last = operation(**inputs, initial_state=state, scale=0.5, chunk_size=32, backend=backend)
        loss = (out * normal(*out.shape)).sum() + (last * normal(*last.shape)).sum()
        results.append((out, last, *torch.autograd.grad(loss, [state, *leaves])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_gated_delta_rule_is_a_special_case_of_diagonal_plus_low_rank() -> None:
    delta = delta_inputs("scalar", key_heads=4)
    k, beta, decay = delta["k"], delta["beta"].unsqueeze(-1), delta["log_decay"].unsqueeze(-1)
    general = dplr(delta["q"], beta * k, delta["v"], -k * decay.exp(), beta * k, decay.expand_as(k))
    assert_equal(delta_rule(**delta), general)


@over_operations
def test_segments_and_single_steps_equal_the_whole(operation: Any, step: Any, make: Any) -> None:
    inputs = make(time=40)
    whole = operation(**inputs, chunk_size=16)
    state, outputs = None, []
    for start, end in ((0, 7), (7, 8), (8, 8), (8, 29), (29, 40)):
        out, state = operation(**cut(inputs, start, end), initial_state=state, chunk_size=16)
        outputs.append(out)
    assert_equal((torch.cat(outputs, dim=1), state), whole)
    with torch.no_grad():
        state, outputs = torch.zeros_like(state), []
        for t in range(40):
            out, stepped = step(**token(inputs, t), state=state)
            assert stepped.data_ptr() == state.data_ptr(), "decoding writes the state in place"
            outputs.append(out)
    assert_equal((torch.stack(outputs, dim=1), state), whole)


@over_operations
def test_states_larger_than_the_cache_are_stepped_a_few_at_a_time(
    operation: Any, step: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = token(make(batch=5, time=1), 0)
    state = normal(5, inputs["v"].shape[1], 60, 100)
    with torch.no_grad():
        whole = step(**inputs, state=state.clone())
        monkeypatch.setattr("archcompass.kernels.steps.WORTH_PIECES", 0)
        monkeypatch.setattr("archcompass.kernels.steps.PIECE_BYTES", 2 * state[0].nbytes)
        out, stepped = step(**inputs, state=state)
    assert stepped.data_ptr() == state.data_ptr()
    assert_equal((out, stepped), whole)


@over_operations
def test_a_step_that_is_trained_through_leaves_the_state_it_was_given(operation: Any, step: Any, make: Any) -> None:
    inputs = make(time=1)
    state = normal(2, inputs["v"].shape[2], 60, 100)
    before = state.clone()
    step(**token(inputs, 0), state=state)
    assert torch.equal(state, before)


@over_operations
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_equal_separate_ones(operation: Any, step: Any, make: Any, backend: str) -> None:
    inputs = make(batch=1, time=50)
    bounds = [0, 0, 1, 20, 20, 50]
    state = normal(5, inputs["v"].shape[2], 60, 100)
    packed = operation(**inputs, initial_state=state, cu_seqlens=torch.tensor(bounds), backend=backend)
    pairs = [
        operation(**cut(inputs, start, end), initial_state=state[n : n + 1], backend=backend)
        for n, (start, end) in enumerate(pairwise(bounds))
    ]
    assert_equal(packed, (torch.cat([out for out, _ in pairs], dim=1), torch.cat([last for _, last in pairs])))


@over_operations
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_empty_sequence_keeps_its_state(operation: Any, step: Any, make: Any, backend: str) -> None:
    inputs = make(time=0)
    state = normal(2, inputs["v"].shape[2], 60, 100)
    out, last = operation(**inputs, initial_state=state, backend=backend)
    assert out.shape == inputs["v"].shape
    assert torch.equal(last, state)


@over_operations
@pytest.mark.parametrize("strength", [1e-6, 30.0, 5000.0], ids=["vanishing", "strong", "total"])
def test_any_decay_is_safe_in_float32(operation: Any, step: Any, make: Any, strength: float) -> None:
    exact = operation(**make(strength=strength), backend="reference")
    leaves = make(strength=strength, dtype=torch.float32)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in leaves.items()}
    out, state = operation(**leaves)
    assert relative_error(out.detach(), exact[0]) < 2e-5
    assert relative_error(state.detach(), exact[1]) < 2e-5
    gradients = torch.autograd.grad(out.sum() + state.sum(), [x for x in leaves.values() if x is not None])
    assert all(gradient.isfinite().all() for gradient in gradients)


@over_operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_its_rounding(operation: Any, step: Any, make: Any, dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype)
    for name in ("v",):
        inputs[name] = inputs[name] * (1e4 if dtype == torch.bfloat16 else 10)
    exact = operation(**{k: None if x is None else x.double() for k, x in inputs.items()}, backend="reference")
    out, state = operation(**inputs)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_error(out, exact[0]) < 8 * torch.finfo(dtype).eps
    assert relative_error(state, exact[1]) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_a_float32_state_does_not_drift_over_64k_steps(decay: str) -> None:
    """Weak decay: after 65536 tokens the state still remembers thousands of them."""
    inputs = delta_inputs(decay, batch=1, time=65536, key_heads=1, heads=1, key_dim=4, value_dim=3, strength=2e-4)
    exact = delta_rule(**inputs)
    single = {name: x.float() for name, x in inputs.items()}
    with torch.no_grad():
        out, state = delta_rule(**single)
    assert relative_error(out[:, -1000:], exact[0][:, -1000:]) < 1e-5
    assert relative_error(state, exact[1]) < 1e-5


def test_scores_of_several_kinds_equal_their_sums() -> None:
    torch.manual_seed(0)
    rows, columns = normal(8, 2, 5), normal(8, 3, 5)
    row_decay, column_decay = (-uniform(8, 1, 5).cumsum(0) for _ in range(2))
    column_decay = row_decay
    scores = vector_decayed_scores(rows, row_decay, columns, column_decay)
    factor = (row_decay[:, None] - column_decay[None]).exp().squeeze(2)
    for i in range(8):
        for j in range(i + 1):
            expected = (rows[i, :, None] * columns[j, None] * factor[i, j]).sum(-1)
            torch.testing.assert_close(scores[i, :, j], expected)
    assert not scores.permute(1, 3, 0, 2).triu(1).any()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", [1, 16, 128])
def test_flops_of_the_delta_rule_are_what_the_counter_counts(decay: str, time: int) -> None:
    inputs = delta_inputs(decay, time=time, dtype=torch.bfloat16)
    cost = delta_rule_cost(
        batch=2, new_tokens=time, key_heads=2, heads=4, key_dim=60, value_dim=100, decay=decay, element_bytes=2
    )
    with FlopCounterMode(display=False) as counter:
        delta_rule(**{name: None if x is None else x.to("meta") for name, x in inputs.items()})
    assert cost.flops == counter.get_total_flops()


@pytest.mark.parametrize("time", [1, 16, 128])
def test_flops_of_dplr_are_what_the_counter_counts(time: int) -> None:
    cost = dplr_cost(batch=2, new_tokens=time, heads=3, key_dim=60, value_dim=100, element_bytes=4)
    with FlopCounterMode(display=False) as counter:
        dplr(**{name: x.to("meta") for name, x in dplr_inputs(time=time).items()})
    assert cost.flops == counter.get_total_flops()


def test_bytes_of_a_step_are_its_inputs_its_output_and_the_state_twice() -> None:
    cost = delta_rule_cost(
        batch=3, new_tokens=1, key_heads=2, heads=4, key_dim=8, value_dim=16, decay="scalar", element_bytes=2
    )
    inputs = {name: x[:3] for name, x in delta_inputs("scalar", batch=3, time=1, key_dim=8, value_dim=16).items()}
    elements = sum(inputs[name].numel() for name in ("q", "k", "v", "v"))
    gates = inputs["beta"].numel() + inputs["log_decay"].numel()
    assert cost.activation_bytes == 2 * elements + 4 * gates
    assert cost.state_bytes == 2 * 4 * 3 * 4 * 8 * 16


def test_it_compiles_to_one_graph() -> None:
    inputs = delta_inputs("scalar", time=20, heads=2, key_dim=8, value_dim=4, dtype=torch.float32)
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**inputs), delta_rule(**inputs), tolerance=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 48}, "chunk_size is 48; it must be a power of two"),
        ({"beta": torch.ones(2, 75, 3)}, r"beta has shape \[2, 75, 3\]; it must be \[2, 75, 4\]"),
        ({"log_decay": torch.ones(2, 75, 4)}, "log_decay is positive somewhere"),
        ({"log_decay": torch.zeros(2, 75, 4, 61)}, r"log_decay has shape"),
        ({"v": torch.zeros(2, 75, 3, 100)}, "v has 3 heads, which 2 key heads cannot share"),
        ({"initial_state": torch.zeros(1, 4, 60, 100)}, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 75])}, "packed sequences need a batch of 1, not 2"),
        ({"k": torch.zeros(2, 75, 2, 61)}, "must be"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Inputs, message: str) -> None:
    with pytest.raises(InputError, match=message):
        delta_rule(**{**delta_inputs("scalar"), **change})


def test_dplr_refuses_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(InputError, match="b has shape"):
        dplr(**{**dplr_inputs(), "b": torch.zeros(2, 75, 3, 61)})


def test_the_choice_of_backend_is_data_and_a_named_one_is_never_replaced() -> None:
    q = delta_inputs("scalar")["q"]
    assert explain(q).backend == "torch"
    assert "triton" in explain(q).rejected
    with pytest.raises(BackendError, match="triton"):
        delta_rule(**delta_inputs("scalar"), backend="triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("decay", DECAYS)
def test_the_gpu_operator_has_shapes_and_flops_without_a_gpu(decay: str) -> None:
    from archcompass.kernels.delta_rule.triton_op import chunk_table, delta_rule_op

    call = {name: None if x is None else x.float().to("meta") for name, x in delta_inputs(decay, time=80).items()}
    table = chunk_table(call["v"], 32, None)
    flat = [None if x is None else x.flatten(0, 1) for x in call.values()]
    with FlopCounterMode(display=False) as counter:
        out, last, *_ = delta_rule_op(*flat, torch.zeros(2, 4, 60, 100, device="meta"), *table[1:], 1.0, 32)
    cost = delta_rule_cost(
        batch=2,
        new_tokens=80,
        key_heads=2,
        heads=4,
        key_dim=60,
        value_dim=100,
        decay=decay,
        element_bytes=4,
        chunk_size=32,
    )
    assert out.shape == flat[2].shape
    assert last.shape == (2, 4, 60, 100)
    assert counter.get_total_flops() == cost.flops


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("form", [*DECAYS, "dplr"])
def test_training_on_a_gpu_has_shapes_and_flops_without_one(form: str) -> None:
    from archcompass.kernels.delta_rule.triton_op import delta_rule_triton, dplr_triton

    made = dplr_inputs(time=80) if form == "dplr" else delta_inputs(form, time=80)
    call = {name: None if x is None else x.float().to("meta").requires_grad_() for name, x in made.items()}
    leaves = [x for x in call.values() if x is not None]
    heads, value_dim = made["v"].shape[2:]
    state = torch.zeros(2, heads, made["q"].shape[3], value_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        out, last = (dplr_triton if form == "dplr" else delta_rule_triton)(*call.values(), state, 1.0, 32, None)
        forward = counter.get_total_flops()
        gradients = torch.autograd.grad(out.sum() + last.sum(), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
    # Five or six products of a vector decay's scores for one, since every halving is a whole square; three else.
    most = {"vector": 9, "dplr": 9}.get(form, 4)
    assert 2 * forward <= counter.get_total_flops() - forward <= most * forward


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_chunks_of_packed_sequences_cover_every_token_once() -> None:
    from archcompass.kernels.delta_rule.triton_op import chunk_table

    table = chunk_table(torch.zeros(1, 50, 2, 3), 16, [(0, 0), (0, 1), (1, 20), (20, 20), (20, 50)])
    assert table.bounds.tolist() == [0, 0, 1, 3, 3, 5]
    tokens = [int(at) + i for at, n in zip(table.first, table.length, strict=True) for i in range(int(n))]
    assert tokens == list(range(50))


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder
import archcompass.kernels.delta_rule.cost, archcompass.kernels.selective_scan.cost
assert "torch" not in sys.modules
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from archcompass.kernels.delta_rule import delta_rule
from archcompass.kernels.selective_scan import selective_scan
x = torch.ones(1, 20, 2, 4)
assert delta_rule(x, x / 2, x, x[..., 0])[0].isfinite().all()
assert selective_scan(x[..., 0], x[..., 0], -x[0, :2, 0], x[:, :, 0], x[:, :, 0])[0].isfinite().all()
assert "triton" not in sys.modules
"""


def test_costs_are_known_without_torch_and_the_cpu_path_runs_without_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)
