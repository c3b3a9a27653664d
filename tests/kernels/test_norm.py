"""RMS normalisation: torch path against the formula, with every option, and what is rounded when."""

import itertools

import pytest
import torch

from archcompass.errors import BackendError, InputError
from archcompass.kernels.norm import explain, rms_norm, rms_norm_cost

OPTIONS = list(
    itertools.product(("none", "first", "last"), (None, 6), (False, True), ("silu", "sigmoid"), (False, True))
)


def make(gate="none", group_size=None, unit_offset=False, activation="silu", residual=False, rows=(3, 7), width=24):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {"x": normal(*rows, width), "weight": normal(width)}
    options = {"eps": 1e-5, "group_size": group_size, "unit_offset": unit_offset, "gate_activation": activation}
    if gate != "none":
        given["gate"] = normal(*rows, width)
        options["gate_first"] = gate == "first"
    if residual:
        given["residual"] = normal(*rows, width)
    return given, options


@pytest.mark.parametrize("case", OPTIONS)
def test_equals_the_formula(case):
    given, options = make(*case)
    torch.testing.assert_close(
        rms_norm(**given, **options), rms_norm(**given, **options, backend="reference"), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("case", [("none", None), ("first", 6), ("last", None)])
def test_passes_gradcheck(case):
    given, options = make(*case, residual=True, rows=(2,), width=6)
    tensors = [x.requires_grad_() for x in given.values()]
    assert torch.autograd.gradcheck(lambda *xs: rms_norm(**dict(zip(given, xs, strict=True)), **options), tensors)


def test_the_formula_is_the_one_of_the_paper():
    x, weight = torch.randn(5, 8).double(), torch.randn(8).double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    torch.testing.assert_close(rms_norm(x, weight - 1, 1e-6, unit_offset=True), expected)
    torch.testing.assert_close(rms_norm(x, None, 1e-6) * weight, expected)


def test_a_residual_is_added_in_the_dtype_of_x_and_given_back():
    x, residual = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    y, summed = rms_norm(x, None, 1e-6, residual=residual)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, rms_norm(x + residual, None, 1e-6))


@pytest.mark.parametrize("gate", ["none", "first", "last"])
def test_bfloat16_is_rounded_once(gate):
    given, options = make(gate, rows=(64,), width=256)
    rounded = {name: x.bfloat16() for name, x in given.items()}
    y = rms_norm(**rounded, **options)
    exact = rms_norm(**{name: x.double() for name, x in rounded.items()}, **options).bfloat16()
    assert (y != exact).float().mean() < 0.01


@pytest.mark.parametrize("gate", ["none", "first", "last"])
def test_blocks_of_rows_change_nothing(gate):
    given, options = make(gate, rows=(5, 300), width=128)
    with torch.no_grad():
        by_blocks = rms_norm(**given, **options)
    torch.testing.assert_close(by_blocks, rms_norm(**given, **options), rtol=0, atol=1e-12)


def test_meta_and_compile():
    given, options = make("first", 6, residual=True)
    y, summed = rms_norm(**{name: x.to("meta") for name, x in given.items()}, **options)
    assert y.shape == summed.shape == (3, 7, 24)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given, **options), rms_norm(**given, **options))


def test_no_rows():
    assert rms_norm(torch.ones(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


def test_the_stated_bytes_are_those_of_the_tensors():
    x = torch.ones(3, 7, 24)
    assert rms_norm_cost(rows=21, width=24, element_bytes=4).activation_bytes == 2 * x.nbytes
    assert rms_norm_cost(rows=21, width=24, element_bytes=4, residual=True, gate=True).activation_bytes == 5 * x.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, "the width of x"),
        ({"gate": torch.ones(3)}, "gate has shape"),
        ({"gate_activation": "relu"}, "choose silu or sigmoid"),
        ({"group_size": 7}, "does not divide the width 24"),
    ],
)
def test_refuses_what_does_not_belong_together(change, message):
    given, options = make()
    with pytest.raises(InputError, match=message):
        rms_norm(**{**given, **options, **change})


def test_says_why_a_backend_was_passed_over():
    assert "registers" in explain(torch.ones(1, 40000)).rejected["triton"]
    with pytest.raises(BackendError, match="float64"):
        rms_norm(torch.ones(1, 8).double(), None, 1e-6, backend="triton")
