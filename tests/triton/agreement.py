"""Runs in a process of its own with TRITON_INTERPRET=1: every Triton kernel against the formula.

Outputs are poisoned with NaN before a kernel may write them, pointers are checked, and the error against the float64
formula may be at most twice that of plain torch in the same dtype.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import interpreter
from support.cases import Agreement, agreements
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

interpreter.install()
# Set by test_modes.py, which runs two halves of the cases side by side.
HALF = os.environ.get("ARCHCOMPASS_HALF")
CASES = {name: case for n, (name, case) in enumerate(agreements().items()) if HALF in (None, str(n % 2))}
# Between them every kernel of a whole call, and every optional input.
STRIDED = {
    "attention-latent-step",
    "attention-sparse-step",
    "attention-step",
    "attention-window-sinks",
    "conv-packed",
    "cross_entropy-none",
    "delta_rule-dplr-packed-training",
    "delta_rule-packed-scalar-training",
    "diagonal_scan-training",
    "linear_attention-scalar-exclusive-packed",
    "moe-gpt-oss",
    "norm-gate-last-sigmoid",
    "rope-interleaved-partial",
    "selective_scan-inference",
    "selective_scan-packed-training",
    "selective_scan-segments",
}

# Added to the allowed relative error, so that a lucky torch does not fail us: a quarter of a unit in the last place for
# the half types, and eight units for float32, where sums are merely taken in another order.
FLOOR = {torch.float32: 8 * 2.0**-23, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was not written is NaN (a huge number in integers), so that a forgotten row shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate):
    def poisoned(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        if fresh.device.type == "meta" or not fresh.numel():
            return fresh
        if fresh.is_floating_point():
            return fresh.fill_(torch.nan)
        return fresh if fresh.dtype == torch.bool else fresh.fill_(torch.iinfo(fresh.dtype).max)

    return poisoned


def results(case: Agreement, backend: str, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    """Outputs, then gradients of a fixed weighted sum of them."""
    leaves = {
        name: x.detach().clone().requires_grad_() if name in case.gradients and x is not None else x
        for name, x in inputs.items()
    }
    outputs = case.call(backend=backend, **leaves)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
    wanted = [leaves[name] for name in case.gradients if leaves[name] is not None]
    if not wanted:
        return outputs
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    graded = [(x, w) for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad([x for x, _ in graded], wanted, [w for _, w in graded])
    return [x.detach() for x in outputs] + list(gradients)


def rounded(case: Agreement, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The same inputs at every call, in the dtype under test."""
    torch.manual_seed(0)
    return {
        key: x if x is None or not x.is_floating_point() else x.to(torch.float32 if key in case.float32 else dtype)
        for key, x in case.inputs().items()
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_triton_is_as_good_as_torch_in_the_same_dtype(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    if dtype not in case.dtypes:
        pytest.skip("not a dtype of this case")
    inputs = rounded(case, dtype)
    exact = {key: x.double() if x is not None and x.is_floating_point() else x for key, x in inputs.items()}
    expected = results(case, "reference", exact)
    plain = results(case, "torch", inputs)
    for n, (got, want, same) in enumerate(zip(results(case, "triton", inputs), expected, plain, strict=True)):
        assert got.shape == want.shape
        assert torch.isfinite(got).all(), f"result {n} has {int((~torch.isfinite(got)).sum())} elements not finite"
        allowed = case.slack * relative_error(same, want) + FLOOR[dtype]
        assert relative_error(got, want) <= allowed, (
            f"result {n}: error {relative_error(got, want):.2e} > {allowed:.2e}"
        )


def strided(x: Tensor | None) -> Tensor | None:
    """The same numbers, each with a NaN (or a huge number) beside it in memory."""
    if x is None or not x.ndim:
        return x
    gap = torch.full_like(x, torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)
    return torch.stack([x, gap], dim=-1)[..., 0]


class Operators(TorchDispatchMode):
    """Remembers one call of every operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "archcompass":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(STRIDED & CASES.keys()))
def test_strides_do_not_matter_and_operators_say_beforehand_what_they_give(name: str) -> None:
    case = CASES[name]
    inputs = rounded(case, case.dtypes[0])
    with Operators() as operators:
        expected = results(case, "triton", inputs)
    call = replace(
        case, call=lambda backend, **given: case.call(backend, **{key: strided(x) for key, x in given.items()})
    )
    for got, want in zip(results(call, "triton", inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert operators.calls
    for operator, args in operators.calls.items():
        torch.library.opcheck(operator, args, test_utils="test_faketensor")


def test_the_interpreter_refuses_a_wild_pointer() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def read_past_the_end(x_ptr, out_ptr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out_ptr + at, tl.load(x_ptr + at + 1))

    x = torch.ones(8)
    with pytest.raises(Exception, match="1 of 8 lanes out of bounds"), torch.cuda.device_of(x):
        read_past_the_end[(1,)](x, torch.zeros(8), SIZE=8)


def test_the_interpreter_refuses_a_launch_on_whatever_gpu_is_current() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def write_one(out_ptr):
        tl.store(out_ptr, 1.0)

    with pytest.raises(RuntimeError, match="write_one is launched on whatever GPU"):
        write_one[(1,)](torch.zeros(1))


def test_the_interpreter_rounds_bfloat16_as_torch_does() -> None:
    x = torch.randn(4096)
    assert torch.equal(torch.from_numpy(interpreter.narrow(x.numpy()).view("int16")).view(torch.bfloat16), x.bfloat16())
