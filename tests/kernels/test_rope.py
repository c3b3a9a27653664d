"""Rotary embedding against complex multiplication."""

from typing import Any

import pytest
import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.rope import rotate, rotate_cost, rotate_one


def angles(time: int, half: int, batch: int | None = None, **kind: Any) -> tuple[Tensor, Tensor]:
    angle = torch.arange(time)[:, None] * torch.logspace(0, -2, half, dtype=torch.float64)
    if batch is not None:
        angle = angle + torch.arange(batch)[:, None, None]
    return angle.cos().to(**kind), angle.sin().to(**kind)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(("time", "width", "half"), [(7, 12, 6), (1, 60, 15), (75, 10, 1)])
def test_the_torch_path_equals_complex_multiplication(
    time: int, width: int, half: int, batch: int | None, interleaved: bool
) -> None:
    x = torch.randn(2, time, 3, width, dtype=torch.float64, requires_grad=True)
    table = angles(time, half, batch, dtype=torch.float64)
    results = []
    for backend in ("torch", "reference"):
        y = rotate(x, *table, interleaved=interleaved, backend=backend)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_position_is_turned_with_the_roundings_of_many(dtype: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(2, 1, 3, 16).to(dtype), angles(1, 8, 2, dtype=dtype)
    whole = (torch.cat((cos, cos), dim=-1)[:, :, None], torch.cat((-sin, sin), dim=-1)[:, :, None])
    assert torch.equal(rotate_one(x, *whole), rotate(x, cos, sin))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_position_at_all_is_no_error(backend: str) -> None:
    assert rotate(torch.zeros(2, 0, 3, 4), *angles(0, 2), backend=backend).shape == (2, 0, 3, 4)


def test_scores_of_rotated_heads_depend_on_distance_alone() -> None:
    cos, sin = angles(30, 8, dtype=torch.float64)
    q, k = torch.randn(2, 16, dtype=torch.float64).expand(30, 2, 16).unbind(1)
    q, k = (rotate(x[None, :, None], cos, sin)[0, :, 0] for x in (q, k))
    scores = q @ k.t()
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-10)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_bfloat16_heads_stay_bfloat16_and_near_the_truth(table: torch.dtype) -> None:
    x = torch.randn(1, 9, 2, 16).bfloat16()
    y = rotate(x, *angles(9, 8, dtype=table))
    truth = rotate(x.double(), *angles(9, 8, dtype=torch.float64))
    assert y.dtype == torch.bfloat16
    assert (y - truth).abs().max() < (0.02 if table == torch.float32 else 0.06)


def test_gradcheck_of_the_formula() -> None:
    cos, sin = angles(3, 2, dtype=torch.float64)
    x = torch.randn(1, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, interleaved=True, backend="reference"), x)


def test_a_rotation_moves_bytes_and_multiplies_no_matrices() -> None:
    cost = rotate_cost(batch=2, time=3, heads=4, head_dim=8, rotary_dim=4, element_bytes=2)
    assert cost.flops == 0
    assert cost.activation_bytes == 2 * (2 * 3 * 4 * 8) * 2 + 3 * 4 * 4


@pytest.mark.parametrize(
    ("shape", "table", "message"),
    [((3, 2, 4), (3, 2), "rotate takes"), ((1, 3, 2, 4), (4, 2), "but x is"), ((1, 3, 2, 4), (3, 3), "turns 6")],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], table: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rotate(torch.zeros(shape), torch.zeros(table), torch.zeros(table))
