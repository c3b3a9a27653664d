"""The state that grows, and the context of a call."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archcompass.blocks.runtime import Context, GrowingState, Linear, at_once
from archcompass.kernels.linear import together


def numbered(start: int, time: int) -> torch.Tensor:
    """[2, time, 1] whose values are their positions."""
    return torch.arange(start, start + time, dtype=torch.float64).view(1, -1, 1).expand(2, -1, -1)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.sampled_from([None, 1, 2, 7, 64]))
def test_a_call_sees_what_is_kept_and_what_is_new(segments: list[int], keep: int | None) -> None:
    state, seen = GrowingState(keep), 0
    for time in segments:
        new = numbered(seen, time)
        got = state.append(key=new, value=-new)
        past = seen if keep is None else min(seen, keep)
        assert torch.equal(got["key"], numbered(seen - past, past + time))
        assert torch.equal(got["value"], -got["key"])
        assert state.first_position == seen - past
        seen += time
        kept = seen if keep is None else min(seen, keep)
        assert torch.equal(state.tensors()["key"], numbered(seen - kept, kept))
        assert state.nbytes == 2 * 2 * kept * 8


def test_steps_seldom_copy() -> None:
    """Over a thousand steps the buffer moves a few times, not a thousand."""
    for keep in (None, 32):
        state, places = GrowingState(keep), []
        for position in range(1000):
            state.append(key=numbered(position, 1))
            places.append(state._buffers["key"].data_ptr())
        assert sum(before != after for before, after in pairwise(places)) < 20


def test_a_window_takes_no_more_than_its_share() -> None:
    state = GrowingState(keep=32)
    state.append(key=numbered(0, 5000))
    for position in range(5000, 6000):
        state.append(key=numbered(position, 1))
    assert state._buffers["key"].shape[1] == 2 * 32


def test_a_cache_of_known_length_takes_exactly_its_place() -> None:
    state = GrowingState(room=10)
    for position, time in ((0, 7), *((7 + step, 1) for step in range(10))):
        state.append(key=numbered(position, time))
    assert state.held_bytes == state.nbytes == 2 * 17 * 8
    state.append(key=numbered(17, 1))
    assert state.held_bytes > state.nbytes == 2 * 18 * 8


def test_a_copy_goes_its_own_way() -> None:
    state = GrowingState(keep=4)
    state.append(key=numbered(0, 6))
    twin = state.copy()
    state.append(key=numbered(6, 3))
    assert torch.equal(twin.tensors()["key"], numbered(2, 4))
    twin.append(key=10 + numbered(6, 1))
    assert torch.equal(state.tensors()["key"], numbered(5, 4))
    assert twin.first_position == 2


def test_positions_count_from_the_first_real_token() -> None:
    context = Context(past=3, padding=torch.tensor([0, 5]))
    assert context.positions(4, torch.device("cpu")).tolist() == [[3, 4, 5, 6], [0, 0, 0, 1]]
    real = context.real(4, torch.device("cpu"))
    assert real is not None
    assert real[..., 0].tolist() == [[True] * 4, [False, False, True, True]]
    assert Context(past=3).positions(2, torch.device("cpu")).tolist() == [[3, 4]]
    assert Context().real(4, torch.device("cpu")) is None


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_pass_through_a_state(grad: bool) -> None:
    """Truncated backpropagation through time: what later segments see of earlier ones can be learned from."""
    x = torch.randn(2, 9, 1, dtype=torch.float64, requires_grad=grad)
    state = GrowingState()
    state.append(key=x[:, :4])
    first = state.append(key=x[:, 4:6])["key"].square()
    second = state.append(key=x[:, 6:])["key"].square()
    if grad:
        (first.sum() + second.sum()).backward()
        assert torch.allclose(x.grad, torch.where(torch.arange(9).view(1, 9, 1) < 6, 4 * x, 2 * x))


def test_a_stranger_among_layers_that_are_read_together_is_called() -> None:
    class Doubled(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    first, second, stranger = Linear(64, 48).bfloat16(), Linear(64, 48).bfloat16(), Doubled(64, 48).bfloat16()
    weights = list(together([torch.randn(48, 64).bfloat16() for _ in range(2)]))
    for layer, weight in zip((first, second, stranger), (*weights, weights[1]), strict=True):
        layer.weight.data = weight
    inputs = torch.randn(2, 1, 64).bfloat16()
    with torch.inference_mode():
        one, two = at_once([first, second], inputs)
        assert torch.equal(one, first(inputs[0]))
        assert torch.equal(at_once([first, stranger], inputs)[1], 2 * two)
