"""Mixtures of experts: routing by its invariants and by each model's own recipe, experts against the definition."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import InputError
from archcompass.kernels.moe import expected_distinct_experts, explain, load_balance_loss, moe_cost, moe_mlp, route
from archcompass.kernels.moe.activations import Activation, Experts
from archcompass.kernels.moe.few_rows import in_batches
from archcompass.kernels.moe.grouped import by_expert, grouped_mm_obstacle, moe_grouped, moe_grouped_mm

GPT_OSS = {"activation": "swish", "alpha": 1.702, "limit": 0.5, "up_offset": 1.0}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu": {"activation": "gelu"},
    "gelu-tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "relu2-without-gate": {"activation": "relu2", "gated": False},
    "gpt-oss": GPT_OSS,
}


def experts_of(
    tokens: int, experts: int, hidden: int, inner: int, *, gated: bool = True, bias: bool = False, **kind: Any
) -> dict[str, Tensor]:
    kind = {"dtype": torch.float64, "requires_grad": True} | kind
    rows = 2 * inner if gated else inner
    made = {
        "x": torch.randn(tokens, hidden, **kind),
        "gate_up": torch.randn(experts, rows, hidden, **kind),
        "down": torch.randn(experts, hidden, inner, **kind),
    }
    if bias:
        made |= {"gate_up_bias": torch.randn(experts, rows, **kind), "down_bias": torch.randn(experts, hidden, **kind)}
    return made


@pytest.mark.parametrize("settings", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 7, 3), (1, 7, 3), (0, 7, 3), (5, 4, 4), (3, 13, 1)])
def test_experts_equal_their_definition_with_gradients(
    tokens: int, experts: int, top_k: int, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    for bias, scale_input in itertools.product((False, True), (False, True)):
        given = experts_of(tokens, experts, 10, 6, gated=settings.get("gated", True), bias=bias)
        logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
        weights, chosen = route(logits, top_k, score="sigmoid")
        inputs = [logits, *given.values()]
        results = []
        for backend in ("torch", "reference"):
            y = moe_mlp(weights=weights, experts=chosen, **given, **settings, scale_input=scale_input, backend=backend)
            upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            gradients = torch.autograd.grad((y * upstream).sum(), inputs, retain_graph=True, allow_unused=True)
            results.append([y, *gradients])
        for mine, theirs in zip(*results, strict=True):
            if theirs is None:  # no token at all: nothing flows
                assert mine is None or (mine == 0).all()
            else:
                assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_of_the_experts(backend: str) -> None:
    torch.manual_seed(1)
    given = experts_of(3, 3, 4, 2, bias=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2]])  # expert 1 is idle

    def run(weights: Tensor, *tensors: Tensor) -> Tensor:
        return moe_mlp(weights=weights, experts=chosen, **dict(zip(given, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(run, (weights, *given.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33])
def test_low_precision_errs_at_most_twice_as_much_as_the_definition_in_it(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    exact = experts_of(tokens, 7, 97, 47, requires_grad=False)
    rounded = {name: (x * (1 if name == "x" else 0.1)).to(dtype) for name, x in exact.items()}
    weights, chosen = route(torch.randn(tokens, 7), 3)
    weights = weights.to(dtype)
    wide = {name: x.double() for name, x in rounded.items()}
    truth = moe_mlp(weights=weights.double(), experts=chosen, **wide, backend="reference")
    errors = {}
    for backend in ("torch", "reference"):
        y = moe_mlp(weights=weights, experts=chosen, **rounded, backend=backend)
        assert y.dtype == dtype
        errors[backend] = float((y.double() - truth).norm())
    assert errors["torch"] <= 2 * errors["reference"], errors


@pytest.mark.parametrize("scale_input", [False, True])
def test_the_path_through_grouped_mm_agrees_with_the_loop(scale_input: bool) -> None:
    torch.manual_seed(5)
    given = {name: 0.1 * x for name, x in experts_of(24, 5, 16, 24, bias=True, requires_grad=False).items()}
    given = {name: x.bfloat16() for name, x in given.items()}
    weights, chosen = route(torch.randn(24, 5), 2)
    act = Activation("silu", True)
    biases = (given["gate_up_bias"], given["down_bias"])
    inputs = [given["x"], given["gate_up"], given["down"], *biases]
    results = []
    for path in (moe_grouped_mm, moe_grouped):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = path(leaves[0], weights, chosen, Experts(*leaves[1:], act, scale_input))
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()


def test_float32_without_gradients_goes_expert_by_expert_to_the_same_result() -> None:
    torch.manual_seed(6)
    given = experts_of(24, 5, 16, 24, bias=True, dtype=torch.float32, requires_grad=True)
    weights, chosen = route(torch.randn(24, 5), 2)
    recorded = moe_mlp(weights=weights, experts=chosen, **given)
    with torch.no_grad():
        plain = moe_mlp(weights=weights, experts=chosen, **given)
    assert torch.allclose(plain, recorded, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("settings", [{}, GPT_OSS], ids=["silu", "gpt-oss"])
def test_neighbours_with_a_few_rows_each_equal_their_definition(settings: dict[str, Any], scale_input: bool) -> None:
    torch.manual_seed(7)
    given = experts_of(8, 11, 16, 24, bias=True, dtype=torch.bfloat16, requires_grad=False)
    chosen = torch.tensor([0, 2, 3, 4, 6, 7, 10])[torch.rand(8, 7).topk(3).indices]
    weights = torch.rand(8, 3).bfloat16()
    batches = in_batches(chosen, 11)
    assert batches is not None
    assert [experts for experts, _ in batches.spans] == [slice(0, 1), slice(2, 5), slice(6, 8), slice(10, 11)]
    assert torch.equal(batches.order[batches.place], torch.arange(24))
    assert len(batches.order) > 24  # some were filled up
    wide = {name: x.double() for name, x in given.items()}
    kind = {**settings, "scale_input": scale_input}
    truth = moe_mlp(weights=weights.double(), experts=chosen, **wide, **kind, backend="reference")
    mine, theirs = (
        moe_mlp(weights=weights, experts=chosen, **given, **kind, backend=backend) for backend in ("torch", "reference")
    )
    assert (mine - truth).norm() <= 2 * (theirs - truth).norm()


def test_experts_are_batched_only_where_each_has_a_few_rows() -> None:
    assert in_batches(torch.zeros(9, 1, dtype=torch.int64), 8) is None  # nine rows for one of them
    assert in_batches(torch.arange(3)[:, None], 8) is None  # hardly any is busy
    assert in_batches(torch.arange(8).expand(4, 8), 8) is None  # four rows for every one
    assert in_batches(torch.zeros(8, 1, dtype=torch.int64), 8) is not None


def test_explain_says_who_runs_the_experts_and_what_grouped_mm_wants() -> None:
    x, down = torch.zeros(3, 12, dtype=torch.bfloat16), torch.zeros(2, 12, 16, dtype=torch.bfloat16)
    assert explain(x, down).backend == "torch"
    assert "multiples of 8" in str(grouped_mm_obstacle(x, down))
    assert "takes bfloat16" in str(grouped_mm_obstacle(x.float(), down))
    assert grouped_mm_obstacle(x[:, :8].contiguous(), down) is None


def test_every_choice_lands_in_exactly_one_run_of_its_expert() -> None:
    chosen = torch.rand(50, 13).topk(3).indices  # a prime number of experts
    chosen[chosen == 5] = 6  # and an idle one
    groups = by_expert(chosen, 13)
    assert torch.equal(groups.order.sort().values, torch.arange(150))
    spans = list(groups.runs())
    assert sum(span.stop - span.start for _, span in spans) == 150
    assert 5 not in [expert for expert, _ in spans]
    for expert, span in spans:
        assert (chosen.flatten()[groups.order[span]] == expert).all()
        assert (groups.chosen[span] == expert).all()


def test_meta_counts_the_products_of_the_chosen_experts_exactly() -> None:
    for gated, tokens in itertools.product((True, False), (1, 5)):
        given = experts_of(tokens, 7, 16, 24, gated=gated, device="meta", dtype=torch.bfloat16)
        weights = torch.empty(tokens, 3, device="meta")
        chosen = torch.empty(tokens, 3, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter:
            y = moe_mlp(weights=weights, experts=chosen, **given, gated=gated)
        cost = moe_cost(tokens=tokens, hidden=16, intermediate=24, experts=7, top_k=3, gated=gated, element_bytes=2)
        assert y.shape == (tokens, 16)
        assert counter.get_total_flops() == cost.flops == 2 * (3 if gated else 2) * tokens * 3 * 16 * 24
        real = experts_of(tokens, 7, 16, 24, gated=gated)
        with FlopCounterMode(display=False) as counter:
            moe_mlp(weights=torch.rand(tokens, 3), experts=torch.rand(tokens, 7).topk(3).indices, **real, gated=gated)
        assert counter.get_total_flops() == cost.flops


def test_torch_compile_takes_it_without_a_graph_break() -> None:
    given = experts_of(6, 5, 8, 4, bias=True)
    logits = torch.randn(6, 5, dtype=torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        weights, chosen = route(logits, 2)
        return moe_mlp(weights=weights, experts=chosen, **dict(zip(given, tensors, strict=True))).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(*given.values()), list(given.values())) for f in (compiled, loss))
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))


# Routing


def test_mixtral_normalises_the_softmax_of_the_chosen() -> None:
    logits = torch.randn(11, 7)
    weights, chosen = route(logits, 2)
    scores = logits.softmax(-1)
    assert torch.equal(chosen, scores.topk(2).indices)
    expected = scores.topk(2).values
    assert torch.allclose(weights, expected / expected.sum(-1, keepdim=True))
    assert torch.allclose(route(logits, 2, normalize=False)[0], expected)


def test_gpt_oss_takes_softmax_after_the_choice() -> None:
    logits = torch.randn(11, 7, dtype=torch.bfloat16)
    weights, chosen = route(logits, 4, softmax_after_top_k=True)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, logits.float().gather(-1, chosen).softmax(-1))


def test_deepseek_biases_the_choice_but_not_the_weights_and_keeps_whole_groups() -> None:
    torch.manual_seed(3)
    logits, bias = torch.randn(20, 12), torch.randn(12)
    weights, chosen = route(logits, 3, score="sigmoid", selection_bias=bias, groups=4, groups_kept=2, scaling=2.5)
    scores = logits.sigmoid()
    for token in range(20):
        ranking = (scores[token] + bias).view(4, 3)
        kept = ranking.topk(2).values.sum(-1).topk(2).indices.tolist()
        eligible = [e for e in range(12) if e // 3 in kept]
        best = sorted(eligible, key=lambda e: -float(ranking.flatten()[e]))[:3]
        assert chosen[token].tolist() == best
    plain = scores.gather(-1, chosen)
    assert torch.allclose(weights, 2.5 * plain / plain.sum(-1, keepdim=True))


def test_llama_4_weighs_by_the_sigmoid_of_the_best_logit() -> None:
    logits = torch.randn(9, 5)
    weights, chosen = route(logits, 1, score="sigmoid", normalize=False)
    assert torch.equal(chosen.squeeze(-1), logits.argmax(-1))
    assert torch.allclose(weights.squeeze(-1), logits.max(-1).values.sigmoid())


def test_choosing_every_expert_is_the_full_softmax() -> None:
    logits = torch.randn(4, 6)
    weights, chosen = route(logits, 6)
    assert torch.equal(chosen.sort().values, torch.arange(6).expand(4, -1))
    assert torch.allclose(torch.zeros(4, 6).scatter(-1, chosen, weights), logits.softmax(-1))


def test_routing_works_on_meta_and_for_no_token() -> None:
    for logits in (torch.empty(5, 8, device="meta"), torch.empty(0, 8)):
        weights, chosen = route(logits, 2, score="sigmoid", groups=2, groups_kept=1)
        assert weights.shape == chosen.shape == (len(logits), 2)
        assert chosen.dtype == torch.int64


def test_an_even_router_has_a_balance_loss_of_one_and_a_collapsed_one_of_e() -> None:
    even = torch.full((12, 4), 0.25)
    chosen = torch.arange(24).view(12, 2) % 4
    assert torch.allclose(load_balance_loss(even, chosen), torch.tensor(1.0))
    collapsed = torch.zeros(12, 4)
    collapsed[:, 2] = 1.0
    assert torch.allclose(load_balance_loss(collapsed, torch.full((12, 1), 2)), torch.tensor(4.0))


def test_masked_tokens_do_not_count_in_the_balance_loss() -> None:
    probabilities, chosen = torch.randn(10, 4).softmax(-1), torch.rand(10, 4).topk(2).indices
    mask = torch.arange(10) < 6
    assert torch.allclose(
        load_balance_loss(probabilities, chosen, mask=mask), load_balance_loss(probabilities[:6], chosen[:6])
    )
    assert load_balance_loss(probabilities, chosen, mask=torch.zeros(10, dtype=torch.bool)) == 0


def test_distinct_experts_follow_the_closed_form_and_a_simulation() -> None:
    assert expected_distinct_experts(8, 2, 1) == pytest.approx(2.0)
    assert expected_distinct_experts(8, 8, 3) == 8.0
    torch.manual_seed(4)
    seen = [len(torch.rand(20, 64).topk(4).indices.unique()) for _ in range(200)]
    assert expected_distinct_experts(64, 4, 20) == pytest.approx(sum(seen) / len(seen), rel=0.02)


BAD_ROUTES: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": ({"top_k": 9}, "top_k is 9 of 8 experts"),
    "score": ({"top_k": 2, "score": "tanh"}, "choose softmax or sigmoid"),
    "half-a-grouping": ({"top_k": 2, "groups": 2}, "give both or neither"),
    "uneven-groups": ({"top_k": 2, "groups": 3, "groups_kept": 1}, "equal groups of 8 experts"),
    "too-few-kept": ({"top_k": 3, "groups": 4, "groups_kept": 1}, "hold fewer"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_ROUTES.values(), ids=BAD_ROUTES)
def test_a_routing_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        route(torch.randn(3, 8), **settings)


def test_experts_whose_shapes_do_not_fit_are_refused() -> None:
    given = experts_of(3, 4, 8, 6)
    weights, chosen = route(torch.randn(3, 4), 2)
    with pytest.raises(InputError, match="with hidden 8 as in x"):
        moe_mlp(weights=weights, experts=chosen, **given, gated=False)
    with pytest.raises(InputError, match="activation is 'tanh'"):
        moe_mlp(weights=weights, experts=chosen, **given, activation="tanh")
    with pytest.raises(InputError, match=r"must both be \[3, k\]"):
        moe_mlp(weights=weights[:2], experts=chosen[:2], **given)
    with pytest.raises(InputError, match="down_bias has shape"):
        moe_mlp(weights=weights, experts=chosen, **given, down_bias=torch.zeros(4, 6))
    with pytest.raises(InputError, match="they need a gate"):
        moe_mlp(weights=weights, experts=chosen, **given, gated=False, limit=1.0)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("settings", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_step_of_experts_by_columns_equals_their_definition(
    settings: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archcompass.kernels.linear.WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    kind = {"dtype": torch.bfloat16, "requires_grad": False}
    for bias, scale_input in itertools.product((False, True), (False, True)):
        given = experts_of(1, 7, 64, 32, gated=settings.get("gated", True), bias=bias, **kind)
        by_columns = given | {name: given[name].mT.contiguous().mT for name in ("gate_up", "down")}
        weights, chosen = route(torch.randn(1, 7), 3)
        y = moe_mlp(weights=weights, experts=chosen, **by_columns, **settings, scale_input=scale_input)
        wide = {name: tensor.double() for name, tensor in given.items()}
        exact = moe_mlp(weights=weights.double(), experts=chosen, **wide, **settings, scale_input=scale_input)
        assert (y.double() - exact).norm() < 2e-2 * exact.norm()
