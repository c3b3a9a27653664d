"""The diagonal recurrence: the chunked form against the formula, segments, gradients and extreme decays."""

import pytest
import torch

from archcompass.errors import InputError
from archcompass.kernels.diagonal_scan import diagonal_scan


def random(batch, time, channels, strength, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch * 1000 + time * 10 + channels)
    decay = -strength * torch.rand(batch, time, channels, generator=generator, dtype=dtype)
    return decay, torch.randn(batch, time, channels, generator=generator, dtype=dtype)


@pytest.mark.parametrize("time", [1, 2, 3, 16, 17, 75])
@pytest.mark.parametrize("strength", [0.0, 0.1, 50.0])
def test_the_chunked_form_is_the_formula(time, strength):
    decay, inputs = random(2, time, 5, strength)
    state = torch.randn(2, 5, dtype=torch.float64)
    expected, last = diagonal_scan(decay, inputs, initial_state=state, backend="reference")
    got, got_last = diagonal_scan(decay, inputs, initial_state=state)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_last, last, rtol=1e-12, atol=1e-12)


def test_segments_continue_where_the_last_one_ended():
    decay, inputs = random(1, 40, 3, 1.0)
    whole, last = diagonal_scan(decay, inputs)
    state, parts = None, []
    for start, end in [(0, 7), (7, 8), (8, 40)]:
        out, state = diagonal_scan(decay[:, start:end], inputs[:, start:end], initial_state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_rows_share_one_decay():
    decay, first = random(2, 17, 5, 1.0)
    _, second = random(3, 17, 5, 1.0)
    inputs, state = torch.stack([first, second[:2]], dim=2), torch.randn(2, 2, 5, dtype=torch.float64)
    out, last = diagonal_scan(decay, inputs, initial_state=state)
    for row in range(2):
        alone, end = diagonal_scan(decay, inputs[:, :, row], initial_state=state[:, row], backend="reference")
        torch.testing.assert_close(out[:, :, row], alone)
        torch.testing.assert_close(last[:, row], end)


def test_the_state_is_float32_for_half_precision_inputs():
    decay, inputs = random(1, 9, 4, 0.01, torch.bfloat16)
    out, state = diagonal_scan(decay, inputs)
    assert out.dtype == state.dtype == torch.float32


def test_minus_infinity_starts_anew():
    decay, inputs = random(1, 12, 2, 0.1)
    decay[:, 5] = -torch.inf
    out, _ = diagonal_scan(decay, inputs)
    alone, _ = diagonal_scan(decay[:, 5:], inputs[:, 5:])
    torch.testing.assert_close(out[:, 5:], alone)
    assert out.isfinite().all()


def test_gradients_of_the_chunked_form_are_those_of_finite_differences():
    decay, inputs = random(1, 7, 2, 1.0)
    state = torch.randn(1, 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (decay, inputs, state)]
    assert torch.autograd.gradcheck(lambda g, b, h: diagonal_scan(g, b, initial_state=h), leaves)


def test_an_empty_segment_leaves_the_state_alone():
    state = torch.ones(2, 3)
    out, after = diagonal_scan(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3), initial_state=state)
    assert out.shape == (2, 0, 3)
    assert torch.equal(after, state)


@pytest.mark.parametrize(
    ("decay", "inputs", "state"), [((1, 2, 3), (1, 2, 4), None), ((2, 3), (2, 3), None), ((1, 2, 3), (1, 2, 3), (2, 3))]
)
def test_shapes_that_do_not_belong_together_are_refused(decay, inputs, state):
    with pytest.raises(InputError, match="must"):
        diagonal_scan(
            torch.zeros(decay), torch.zeros(inputs), initial_state=None if state is None else torch.zeros(state)
        )
