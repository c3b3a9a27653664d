"""The inverse of a unit triangular matrix out of matrix products: right, stable, and of as many FLOPs as it says."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archcompass.kernels.delta_rule.cost import inverse_flops
from archcompass.kernels.delta_rule.triangular import unit_lower_inverse, unit_lower_inverse_op


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_inverse_by_halves_is_the_inverse(size: int) -> None:
    torch.manual_seed(0)
    strict = 0.3 * torch.randn(3, size, size, dtype=torch.float64).tril(-1)
    eye = torch.eye(size, dtype=torch.float64)
    product = unit_lower_inverse(strict) @ (eye + strict)
    torch.testing.assert_close(product, eye.expand_as(product), rtol=0, atol=1e-8)


def test_the_inverse_stays_accurate_where_powers_of_the_matrix_explode() -> None:
    """Equal keys written with beta 2: L is 2 below the diagonal, and its powers reach 1e18 while its inverse stays at 2."""
    strict = torch.full((64, 64), 2.0).tril(-1)
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + strict.double())
    torch.testing.assert_close(unit_lower_inverse(strict).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_registered_formula_equals_the_products_that_really_run(size: int) -> None:
    """The operator hides its products from the counter, so its formula is held to the python body, run in the open."""
    with FlopCounterMode(display=False) as counter:
        unit_lower_inverse_op._init_fn(torch.zeros(3, size, size, dtype=torch.float64))
    assert counter.get_total_flops() == 3 * inverse_flops(size)
