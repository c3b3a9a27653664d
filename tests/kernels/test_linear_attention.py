"""Decayed linear attention: the chunked form against the recurrence, in every decay, over segments, packs and steps."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import BackendError, InputError
from archcompass.kernels.linear_attention import (
    explain,
    linear_attention,
    linear_attention_cost,
    linear_attention_step,
)

DECAYS = ("none", "constant", "scalar", "vector")
READS = ("inclusive", "exclusive", "bonus")


def make(
    decay="scalar", read="inclusive", *, batch=2, time=75, groups=2, heads=4, key_dim=6, value_dim=5, strength=1.0
):
    """Random inputs in float64, by the names of the arguments."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {"constant": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}
    log_decay = None if decay == "none" else -strength * normal(*shapes[decay]).abs()
    return {
        "q": normal(batch, time, groups, key_dim),
        "k": normal(batch, time, groups, key_dim),
        "v": normal(batch, time, heads, value_dim),
        "log_decay": log_decay,
        "bonus": normal(heads, key_dim) if read == "bonus" else None,
        "exclusive": read != "inclusive",
        "scale": 0.7,
        "initial_state": normal(batch, heads, key_dim, value_dim),
    }


def cut(inputs, start, end):
    """The same call on some of the tokens, without its state."""
    timed = ("q", "k", "v", "log_decay")
    return {
        name: x[:, start:end] if name in timed and x is not None and x.dim() > 1 else x
        for name, x in inputs.items()
        if name != "initial_state"
    }


def with_gradients(inputs, **options):
    """Outputs, final state, and the gradients of a weighted sum of both."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    out, state = linear_attention(**{**inputs, **leaves}, **options)
    loss = (out * torch.arange(out.numel()).view_as(out).sin()).sum() + state.square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "state": state, **{f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}}


def assert_same(got, expected, tolerance):
    for name, want in expected.items():
        error = (got[name] - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize(("decay", "read"), list(itertools.product(DECAYS, READS)))
def test_chunks_equal_the_recurrence_and_so_do_their_gradients(decay, read):
    inputs = make(decay, read)
    expected = with_gradients(inputs, backend="reference")
    assert_same(with_gradients(inputs, backend="torch"), expected, 1e-10)
    assert_same(with_gradients(inputs, backend="torch", chunk_size=16), expected, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_odd_sizes(decay):
    inputs = make(decay, batch=1, time=75, groups=3, heads=6, key_dim=60, value_dim=100)
    assert_same(with_gradients(inputs, backend="torch"), with_gradients(inputs, backend="reference"), 1e-10)


@pytest.mark.parametrize(("decay", "read"), [("scalar", "inclusive"), ("vector", "bonus")])
def test_the_recurrence_passes_gradcheck(decay, read):
    inputs = make(decay, read, batch=1, time=3, groups=1, heads=2, key_dim=2, value_dim=2)
    names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]

    def call(*tensors):
        return linear_attention(**{**inputs, **dict(zip(names, tensors, strict=True))}, backend="reference")

    assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize(("decay", "read"), list(itertools.product(DECAYS, ("inclusive", "bonus"))))
def test_segments_and_single_tokens_equal_the_whole(decay, read):
    inputs = make(decay, read, time=70)
    out, final = linear_attention(**inputs)
    state, pieces = inputs["initial_state"], []
    for start, end in itertools.pairwise((0, 33, 34, 70)):
        piece, state = linear_attention(**cut(inputs, start, end), initial_state=state)
        pieces.append(piece)
    assert_same({"out": torch.cat(pieces, 1), "state": state}, {"out": out, "state": final}, 1e-12)

    state, pieces = inputs["initial_state"].clone(), []
    for t in range(70):
        now = {name: x[:, 0] if name in "qkv" else x for name, x in cut(inputs, t, t + 1).items()}
        if now["log_decay"] is not None and now["log_decay"].dim() > 1:
            now["log_decay"] = now["log_decay"][:, 0]
        piece, state = linear_attention_step(**now, state=state)
        pieces.append(piece)
    assert_same({"out": torch.stack(pieces, 1), "state": state}, {"out": out, "state": final}, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_pack_equals_its_sequences(decay, backend):
    bounds = [0, 1, 1, 40, 75]
    inputs = make(decay, batch=1)
    states = make(decay, batch=4)["initial_state"]
    packed = {**inputs, "initial_state": states}
    out, final = linear_attention(**packed, cu_seqlens=torch.tensor(bounds), backend=backend)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone, state = linear_attention(**cut(inputs, start, end), initial_state=states[n : n + 1], backend=backend)
        assert torch.equal(out[:, start:end], alone)
        assert torch.equal(final[n : n + 1], state)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("groups", "spans"), [(1, (-119.0, -3.0)), (2, (-119.0, -3.0)), (4, (-500.0, -119.9))])
def test_a_few_heads_may_decay_too_strongly_for_the_rest(groups, spans, read):
    """One head in eight is past what two factors can express, inside one chunk; the others come close to it."""
    inputs = make("scalar", read, batch=1, time=75, groups=groups, heads=8)
    inputs["log_decay"][:, :64] = spans[1] / 64
    inputs["log_decay"][:, 20:30, 5] = 1.5 * spans[0] / 10
    inputs["log_decay"][:, 64, 2] = -118.0
    expected = with_gradients(inputs, backend="reference")
    assert_same(with_gradients(inputs, backend="torch"), expected, 1e-10)
    single = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert_same(with_gradients(single, backend="torch"), expected, 1e-4)


def test_no_tokens_leave_the_state_as_it_is():
    inputs = make(time=0)
    out, state = linear_attention(**inputs)
    assert out.shape == (2, 0, 4, 5)
    assert torch.equal(state, inputs["initial_state"])
    assert linear_attention(**make(batch=1, time=0), cu_seqlens=torch.tensor([0, 0]))[1].shape == (1, 4, 6, 5)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [1e-9, 30.0, 1e4, torch.inf])
def test_vanishing_and_overwhelming_decay(decay, strength):
    inputs = make(decay, time=40)
    inputs["log_decay"] = inputs["log_decay"].sign() * strength
    single = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    out, state = linear_attention(**inputs, backend="reference")
    for given, tolerance in ((inputs, 1e-10), (single, 1e-5)):
        got, final = linear_attention(**given, backend="torch")
        assert_same({"out": got, "state": final}, {"out": out, "state": state}, tolerance)
    assert all(torch.isfinite(x).all() for x in with_gradients(single, backend="torch").values())


@pytest.mark.parametrize("decay", ["constant", "vector"])
def test_a_float32_state_stays_right_over_64k_tokens(decay):
    inputs = make(decay, batch=1, time=65536, groups=1, heads=1, key_dim=2, value_dim=2, strength=1e-4)
    single = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with torch.no_grad():
        out, state = linear_attention(**inputs)
        got, final = linear_attention(**single)
    assert_same({"out": got, "state": final}, {"out": out, "state": state}, 2e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_keeps_its_precision_at_a_large_scale(decay):
    inputs = make(decay, time=200, key_dim=32, value_dim=32, strength=0.1)
    rounded = {
        name: (100 * x).bfloat16() if name in "qkv" else x.float() if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in rounded.items()}
    out, state = linear_attention(**rounded)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want, final = linear_attention(**exact, backend="reference")
    assert (out.double() - want).norm() / want.norm() < 8e-3
    assert (state.double() - final).norm() / final.norm() < 8e-3


def test_cached_spans_change_nothing():
    inputs = make("scalar", batch=1, time=1024, groups=1, heads=8, key_dim=16, value_dim=64)
    with torch.no_grad():
        in_spans = linear_attention(**inputs)
    at_once = linear_attention(**inputs)
    for got, want in zip(in_spans, at_once, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_step_overwrites_the_state_only_where_no_gradient_is_wanted(decay):
    inputs = make(decay, time=1)
    state = inputs.pop("initial_state")
    now = {name: x[:, 0] if isinstance(x, torch.Tensor) and x.dim() > 2 else x for name, x in inputs.items()}
    before = state.clone()
    recorded = linear_attention_step(**now, state=state)
    assert torch.equal(state, before)
    with torch.no_grad():
        out, after = linear_attention_step(**now, state=state)
        assert linear_attention(**inputs, initial_state=before)[1] is not before
    assert after is state
    torch.testing.assert_close((out, after), recorded)


@pytest.mark.parametrize(("decay", "read"), list(itertools.product(DECAYS, ("inclusive", "bonus"))))
@pytest.mark.parametrize("time", [1, 64, 256])
def test_the_stated_flops_are_those_the_counter_sees(decay, read, time):
    inputs = make(decay, read, time=time)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        out, state = linear_attention(**meta)
    assert (out.shape, state.shape) == ((2, time, 4, 5), (2, 4, 6, 5))
    cost = linear_attention_cost(
        batch=2, new_tokens=time, key_groups=2, heads=4, key_dim=6, value_dim=5, decay=decay, element_bytes=2,
        bonus=read == "bonus",
    )  # fmt: skip
    assert counter.get_total_flops() == cost.flops > 0


def test_the_stated_bytes_are_those_of_the_tensors():
    cost = linear_attention_cost(
        batch=3, new_tokens=1, key_groups=2, heads=4, key_dim=6, value_dim=5, decay="vector", element_bytes=2
    )
    assert cost.activation_bytes == 3 * (2 * 2 * (2 * 6 + 4 * 5) + 4 * 4 * 6)
    assert cost.state_bytes == 2 * 3 * 4 * 6 * 5 * 4


def test_the_cost_needs_no_torch():
    check = (
        "import sys, archcompass.kernels.linear_attention as op; op.linear_attention_cost; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_compiles_into_one_graph(decay):
    inputs = make(decay, time=70)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs), linear_attention(**inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1)}, "must be"),
        ({"v": torch.ones(2, 75, 3, 5)}, "3 heads, which 2 key groups cannot share"),
        ({"log_decay": torch.ones(2, 75)}, "log_decay has shape"),
        ({"log_decay": torch.zeros(2, 75, 4, 7)}, r"must be \[2, 75, 4, 6\]"),
        ({"log_decay": torch.full((4,), 0.1)}, "positive somewhere"),
        ({"bonus": torch.ones(4, 6)}, "set exclusive=True"),
        ({"initial_state": torch.ones(1, 4, 6, 5)}, "initial_state has shape"),
        ({"chunk_size": 48}, "power of two"),
        ({"cu_seqlens": torch.tensor([0, 75])}, "batch of 1"),
    ],
)
def test_refuses_what_does_not_belong_together(change, message):
    with pytest.raises(InputError, match=message):
        linear_attention(**{**make(), **change})


@pytest.mark.parametrize("bounds", [[0, 80], [1, 75], [0, 50, 40, 75]])
def test_refuses_boundaries_that_do_not_cover_the_tokens(bounds):
    inputs = make(batch=1)
    inputs["initial_state"] = None
    with pytest.raises(InputError, match="cu_seqlens must"):
        linear_attention(**inputs, cu_seqlens=torch.tensor(bounds))


def test_says_why_a_backend_was_passed_over():
    q = torch.ones(1, 1, 1, 1)
    choice = explain(q, q, q)
    assert choice.backend == "torch"
    assert "triton" in choice.rejected
    with pytest.raises(BackendError, match="float64"):
        linear_attention(q.double(), q.double(), q.double(), backend="triton")
