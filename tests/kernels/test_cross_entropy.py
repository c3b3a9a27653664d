"""The chunked loss against torch's cross entropy on all logits."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import InputError
from archcompass.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_cost


def case(tokens: int = 13, width: int = 6, vocab: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    targets[3::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_equals_torch_on_all_logits_with_its_gradients(reduction: str) -> None:
    hidden, weight, targets = case()
    for soft_cap, scale, chunk in itertools.product((None, 2.0), (1.0, 0.3), (None, 1, 4)):
        settings = {"reduction": reduction, "soft_cap": soft_cap, "scale": scale, "chunk": chunk}
        results = []
        for backend in ("torch", "reference"):
            loss = linear_cross_entropy(hidden, weight, targets, **settings, backend=backend)
            upstream = torch.linspace(1, 3, loss.numel(), dtype=torch.float64).view_as(loss)
            results.append([loss, *torch.autograd.grad((loss * upstream).sum(), (hidden, weight))])
        assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(*results, strict=True))
    plain = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert torch.allclose(plain, cross_entropy(hidden @ weight.t(), targets, reduction=reduction), atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients_the_loss_is_the_same(reduction: str) -> None:
    hidden, weight, targets = case()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=5)
    assert torch.equal(quiet, linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=5).detach()) or (
        torch.allclose(quiet, linear_cross_entropy(hidden, weight, targets, reduction=reduction), atol=1e-12)
    )


def test_gradcheck_of_both_backends() -> None:
    hidden, weight, targets = case(tokens=5, width=3, vocab=4)
    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda h, w, b=backend: linear_cross_entropy(h, w, targets, soft_cap=2.0, chunk=2, backend=b),
            (hidden, weight),
        )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_target_at_all_gives_zero_and_zero_gradients(backend: str) -> None:
    hidden, weight, targets = case()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), backend=backend)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))
    assert linear_cross_entropy(hidden[:0], weight, targets[:0], backend=backend) == 0


def test_bfloat16_gradients_over_many_chunks_are_as_good_as_torch_s() -> None:
    hidden, weight, targets = (x.detach() for x in case(tokens=96, width=32, vocab=50))
    grads = {}
    for dtype, chunk in ((torch.float64, None), (torch.bfloat16, 8)):
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(*inputs, targets, chunk=chunk)
        grads[dtype] = [g.double() for g in torch.autograd.grad(loss, inputs)]
    naive = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    plain = torch.autograd.grad(cross_entropy((naive[0] @ naive[1].t()).float(), targets), naive)
    for truth, mine, theirs in zip(grads[torch.float64], grads[torch.bfloat16], plain, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs.double() - truth).norm()


def test_it_never_holds_all_logits() -> None:
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    hidden, weight, targets = case(tokens=64, width=4, vocab=100)
    from archcompass.kernels.cross_entropy.chunked import _loss_and_gradients

    with Watch():
        token_weights = torch.ones(64, dtype=torch.float64)
        _loss_and_gradients._init_fn(hidden.detach(), weight.detach(), targets, token_weights, -100, None, 1.0, 8)
    assert 8 * 100 <= max(seen) < 64 * 100


def test_the_counter_sees_the_forward_and_both_gradients() -> None:
    hidden, weight, targets = case()
    for training in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            linear_cross_entropy(hidden, weight, targets)
        cost = linear_cross_entropy_cost(tokens=13, width=6, vocab=11, element_bytes=8, training=training)
        assert counter.get_total_flops() == cost.flops


def test_torch_compile_takes_it_without_a_graph_break() -> None:
    hidden, weight, targets = case()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, chunk=4)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, loss))
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_cannot_be_is_refused() -> None:
    hidden, weight, targets = case()
    with pytest.raises(InputError, match="reduction is 'avg'; choose mean, sum or none"):
        linear_cross_entropy(hidden, weight, targets, reduction="avg")
    with pytest.raises(InputError, match="one target per token"):
        linear_cross_entropy(hidden, weight, targets[:4])
    with pytest.raises(InputError, match="takes"):
        linear_cross_entropy(hidden, weight[:, :3], targets)
    with pytest.raises(InputError, match="chunk is 0"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
