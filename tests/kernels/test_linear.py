"""The linear layer says the same whichever library of torch computes it."""

import gc
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archcompass.kernels import pages
from archcompass.kernels.linear import linear, linears, products, together


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 2), (3, 40), (0, 4)])
@pytest.mark.parametrize("columns", [192, 191])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_equals_the_product_in_float64(rows: tuple[int, ...], columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, b = torch.randn(*rows, 160), torch.randn(columns, 160), torch.randn(columns) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert linear(x, weight, b).shape == (*rows, columns)
    assert torch.allclose(linear(x, weight, b).double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.allclose(
        linear(x.transpose(0, -1).contiguous().transpose(0, -1), weight, b).double(), exact, atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 2, 600])
@pytest.mark.parametrize("columns", [96, 95])
def test_float32_by_columns_equals_the_product_in_float64(rows: int, columns: int) -> None:
    x, weight, bias = torch.randn(rows, 160), torch.randn(160, columns).t(), torch.randn(columns)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("elements", [7, pages.PAGE_BYTES // 4 + 5])
def test_large_pages_begin_where_pages_begin_and_hold_what_is_written(elements: int) -> None:
    memory = pages.empty(elements, torch.float32)
    assert memory.shape == (elements,)
    assert elements < pages.PAGE_BYTES // 4 or sys.platform != "linux" or memory.data_ptr() % pages.PAGE_BYTES == 0
    written = torch.arange(elements, dtype=torch.float32)
    part = memory.copy_(written)[elements // 2 :]
    del memory
    gc.collect()
    assert torch.equal(part, written[elements // 2 :])


@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
@pytest.mark.parametrize("columns", [96, 95])
def test_bfloat16_by_columns_rounds_once(rows: tuple[int, ...], columns: int) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(*rows, 160).bfloat16(), torch.randn(columns).bfloat16()
    weight = torch.randn(160, columns).bfloat16().t()
    exact = F.linear(x.double(), weight.double())
    assert (linear(x, weight).double() - exact).norm() <= 0.003 * exact.norm()
    assert (linear(x, weight, bias).double() - exact - bias.double()).norm() <= 0.006 * exact.norm()


def test_gradients_are_recorded_and_flops_counted() -> None:
    x, weight = torch.randn(1, 64), torch.randn(48, 64, requires_grad=True)
    linear(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.expand(48, -1))  # type: ignore[arg-type]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 64 * 48


@pytest.mark.parametrize("stack", [(1, 1), (2, 3), (0, 2)])
def test_stacks_of_large_products_are_right_and_counted(stack: tuple[int, int]) -> None:
    left, right = torch.randn(*stack, 96, 64).mT, torch.randn(*stack, 96, 256)
    torch.testing.assert_close(products(left, right), left @ right, rtol=1e-5, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        products(left, right)
    assert counter.get_total_flops() == 2 * stack[0] * stack[1] * 64 * 96 * 256


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("columns", [(384, 384, 384), (768, 192), (95, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_laid_together_say_what_each_says_alone(
    columns: tuple[int, ...], threads: int, dtype: torch.dtype
) -> None:
    inputs, before = torch.randn(len(columns), 1, 1, 352, dtype=dtype), torch.get_num_threads()
    weights = [torch.randn(count, 352, dtype=dtype) for count in columns]
    laid = list(together(weights))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(laid, weights, strict=True))
    try:
        torch.set_num_threads(threads)
        outputs = linears(inputs, laid)
    finally:
        torch.set_num_threads(before)
    assert outputs is not None
    for x, weight, y in zip(inputs, laid, outputs, strict=True):
        assert torch.equal(y, linear(x, weight))


def test_what_cannot_be_one_call_is_left_to_the_caller() -> None:
    inputs, weights = torch.randn(2, 1, 64).bfloat16(), [torch.randn(48, 64).bfloat16() for _ in range(2)]
    laid = list(together(weights))
    assert linears(inputs, laid) is not None
    assert linears(inputs, weights) is None
    assert linears(inputs, laid[::-1]) is None
    assert linears(inputs, [next(together([weight])) for weight in weights]) is None
    assert linears(inputs.expand(2, 3, 64), laid) is None
    assert linears(inputs.requires_grad_(), laid) is None
