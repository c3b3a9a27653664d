"""Causal depthwise convolution: torch path against the formula, state, segments, packs."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import BackendError, InputError
from archcompass.kernels.conv import causal_conv, causal_conv_cost, explain
from archcompass.kernels.conv.op import _last_packed_tokens

ACTIVATIONS = (None, "silu")


def make(batch=2, time=300, channels=5, width=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, time, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("time", "width"), [(300, 4), (2, 4), (1, 3), (129, 1)])
def test_equals_the_formula_and_torch_itself(activation, time, width):
    inputs = make(time=time, width=width)
    y, state = causal_conv(**inputs, activation=activation)
    expected, final = causal_conv(**inputs, activation=activation, backend="reference")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    seen = torch.cat([inputs["initial_state"], inputs["x"]], dim=1)
    again = F.conv1d(seen.mT, inputs["weight"].unsqueeze(1), inputs["bias"], groups=5).mT
    torch.testing.assert_close(y, F.silu(again) if activation else again, rtol=0, atol=1e-12)
    assert torch.equal(state, final)
    assert torch.equal(state, seen[:, seen.shape[1] - width + 1 :])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_passes_gradcheck(activation):
    inputs = {name: x.requires_grad_() for name, x in make(time=5, channels=2).items()}

    def call(*tensors):
        return causal_conv(**dict(zip(inputs, tensors, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_is_a_well_behaved_operator_of_torch():
    inputs = {name: x.requires_grad_() for name, x in make(time=5, channels=2).items()}
    arguments = (inputs["x"], inputs["initial_state"], inputs["weight"], inputs["bias"], True)
    assert set(torch.library.opcheck(torch.ops.archcompass.causal_conv, arguments).values()) == {"SUCCESS"}


def test_segments_and_single_tokens_equal_the_whole():
    inputs = make(time=20)
    y, final = causal_conv(**inputs, activation="silu")
    for bounds in ((0, 7, 8, 20), range(21)):
        state, pieces = inputs["initial_state"], []
        for start, end in pairwise(bounds):
            part = {**inputs, "x": inputs["x"][:, start:end], "initial_state": state}
            piece, state = causal_conv(**part, activation="silu")
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=0, atol=1e-12)
        assert torch.equal(state, final)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_pack_equals_its_sequences(backend):
    bounds = [0, 1, 1, 3, 20]
    inputs, states = make(batch=1, time=20), make(batch=4)["initial_state"]
    packed = {**inputs, "initial_state": states}
    y, final = causal_conv(**packed, cu_seqlens=torch.tensor(bounds), backend=backend)
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone = {**inputs, "x": inputs["x"][:, start:end], "initial_state": states[n : n + 1]}
        piece, state = causal_conv(**alone, backend=backend)
        assert torch.equal(y[:, start:end], piece)
        assert torch.equal(final[n : n + 1], state)
    assert torch.equal(_last_packed_tokens(inputs["x"], states, torch.tensor(bounds)), final)


@pytest.mark.parametrize("time", [1, 64])
def test_the_stated_flops_are_those_the_counter_sees(time):
    inputs = make(time=time)
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False) as counter:
            y, state = causal_conv(**{name: x.to(device) for name, x in inputs.items()})
        assert (y.shape, state.shape) == ((2, time, 5), (2, 3, 5))
        cost = causal_conv_cost(batch=2, new_tokens=time, channels=5, width=4, element_bytes=8)
        assert counter.get_total_flops() == cost.flops == 2 * 2 * time * 5 * 4
        assert cost.activation_bytes == 2 * inputs["x"].nbytes


def test_compiles_into_one_graph():
    inputs = make(time=9)
    compiled = torch.compile(causal_conv, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs, activation="silu"), causal_conv(**inputs, activation="silu"))


def test_bfloat16_is_rounded_once():
    inputs = make(dtype=torch.bfloat16)
    y, _ = causal_conv(**inputs, activation="silu")
    exact, _ = causal_conv(**{name: x.double() for name, x in inputs.items()}, activation="silu")
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=1e-5)
    assert (y != exact.bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "choose None or 'silu'"),
        ({"weight": torch.ones(4, 4)}, "must be"),
        ({"bias": torch.ones(4)}, "bias has shape"),
        ({"initial_state": torch.ones(2, 4, 5)}, r"must be \[2, 3, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 300])}, "batch of 1"),
    ],
)
def test_refuses_what_does_not_belong_together(change, message):
    with pytest.raises(InputError, match=message):
        causal_conv(**{**make(), **change})


def test_says_why_a_backend_was_passed_over():
    assert "triton" in explain(torch.ones(1, 1, 1)).rejected
    with pytest.raises(BackendError, match="float64"):
        causal_conv(**make(), backend="triton")


def test_a_pack_is_cut_into_little_more_pieces_than_it_has() -> None:
    pytest.importorskip("triton")
    from archcompass.kernels.conv.triton_conv import _cut

    bounds = [0, 0, 1, 20, 20, 52]
    cut = _cut(torch.zeros(1, 52, 3), torch.tensor(bounds), 16)
    assert cut.place is not None
    pieces = [(s, n) for s, (first, last) in enumerate(pairwise(bounds)) for n in range(math.ceil((last - first) / 16))]
    assert [tuple(place) for place in cut.place.tolist()][: len(pieces)] == pieces
    assert len(pieces) <= cut.programs <= len(pieces) + 5
