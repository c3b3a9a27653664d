"""Attention: the torch path against the formula, in float64, over everything a query may be forbidden to see."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import BackendError, InputError
from archcompass.kernels.attention import (
    attention,
    attention_cost,
    dense_flops,
    explain,
    prompt,
    reachable_keys,
    visible_pairs,
)
from archcompass.kernels.attention.reference import attention_mask

VISIBILITY: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": 7},
    "window-of-one": {"window": 1},
    "window-beyond-the-keys": {"window": 300},
    "chunk": {"chunk": 16, "key_offset": 5},
    "chunk-and-window": {"chunk": 16, "window": 9, "key_offset": 37},
}
LENGTHS = [(75, 75), (1, 20), (5, 20), (40, 75), (0, 5), (3, 3)]
HEADS = {"five-on-one": (5, 1, 12, 12), "two-groups": (4, 2, 8, 5), "D60": (2, 1, 60, 60)}


def tensors(
    batch: int, new: int, keys: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, **kind: Any
) -> tuple[Tensor, Tensor, Tensor]:
    kind = {"dtype": torch.float64, "requires_grad": True} | kind
    return (
        torch.randn(batch, new, heads, key_dim, **kind),
        torch.randn(batch, keys, kv_heads, key_dim, **kind),
        torch.randn(batch, keys, kv_heads, value_dim, **kind),
    )


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("see", VISIBILITY.values(), ids=VISIBILITY)
@pytest.mark.parametrize(("new", "keys"), LENGTHS)
def test_the_torch_path_equals_the_formula_with_every_option(new: int, keys: int, see: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = itertools.product(HEADS.values(), (False, True), (None, 3.0), (None, torch.tensor([0, 3])))
    for sizes, with_sinks, soft_cap, padding in options:
        inputs = list(tensors(2, new, keys, *sizes))
        sinks = torch.randn(sizes[0], dtype=torch.float64, requires_grad=True) if with_sinks else None
        inputs += [] if sinks is None else [sinks]
        results = []
        for backend in ("torch", "reference"):
            out, lse = attention(
                *inputs[:3], **see, sinks=sinks, soft_cap=soft_cap, padding=padding, return_lse=True, backend=backend
            )
            weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            results.append([out, lse.exp(), *torch.autograd.grad((out * weight).sum(), inputs)])
        assert all(largest(mine, theirs) < 1e-10 for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("see", VISIBILITY.values(), ids=VISIBILITY)
def test_without_options_the_path_through_sdpa_equals_the_formula(see: dict[str, Any]) -> None:
    torch.manual_seed(1)
    for (new, keys), sizes in itertools.product(LENGTHS, HEADS.values()):
        q, k, v = inputs = tensors(2, new, keys, *sizes)
        results = []
        for backend in ("auto", "reference"):
            out = attention(q, k, v, **see, backend=backend)
            results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)])
        assert all(largest(mine, theirs) < 1e-10 for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("window", [300, 70])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_long_prompts_cross_several_blocks_of_queries(window: int, soft_cap: float | None) -> None:
    q, k, v = tensors(1, 700, 750, 2, 1, 16, 16)
    results = []
    for backend in ("torch", "reference"):
        out = attention(q, k, v, window=window, soft_cap=soft_cap, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(largest(mine, theirs) < 1e-10 for mine, theirs in zip(*results, strict=True))


def test_the_formula_passes_gradcheck_with_everything_on() -> None:
    torch.manual_seed(2)
    q, k, v = tensors(2, 3, 6, 4, 2, 3, 2)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, backend: str = "reference") -> Any:
        padding = torch.tensor([1, 4])
        return attention(q, k, v, sinks=sinks, soft_cap=2.0, window=4, padding=padding, backend=backend)

    assert torch.autograd.gradcheck(formula, (q, k, v, sinks))
    assert torch.autograd.gradcheck(lambda *x: formula(*x, backend="torch"), (q, k, v, sinks))


@pytest.mark.parametrize("see", VISIBILITY.values(), ids=VISIBILITY)
def test_segments_and_single_steps_equal_the_whole(see: dict[str, Any]) -> None:
    if not see.get("causal", True):
        pytest.skip("without causality later keys change earlier outputs")
    torch.manual_seed(3)
    q, k, v = tensors(2, 45, 45, 5, 1, 12, 12, requires_grad=False)
    whole = attention(q, k, v, **see)
    for edges in ([0, 20, 21, 45], [0, 1, 2, 44, 45], list(range(46))):
        parts = [attention(q[:, a:b], k[:, :b], v[:, :b], **see) for a, b in itertools.pairwise(edges)]
        assert largest(torch.cat(parts, dim=1), whole) < 1e-10  # type: ignore[arg-type]


def test_a_cache_that_dropped_old_keys_gives_the_same_with_key_offset() -> None:
    q, k, v = tensors(1, 40, 40, 2, 1, 8, 8, requires_grad=False)
    for see in ({"window": 9}, {"chunk": 16}, {"chunk": 16, "window": 9}):
        whole = attention(q, k, v, **see)
        dropped = attention(q[:, 36:], k[:, 22:], v[:, 22:], **see, key_offset=22)
        assert largest(dropped, whole[:, 36:]) < 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_packed_sequences_equal_separate_ones(backend: str) -> None:
    torch.manual_seed(4)
    q, k, v = tensors(1, 50, 50, 4, 2, 8, 8, requires_grad=False)
    cu_seqlens = torch.tensor([0, 1, 1, 18, 50], dtype=torch.int32)  # the second is empty
    for see in ({}, {"window": 5}, {"chunk": 8}, {"causal": False}):
        packed = attention(q, k, v, **see, cu_seqlens=cu_seqlens, backend=backend)
        alone = [
            attention(q[:, a:b], k[:, a:b], v[:, a:b], **see, backend=backend)
            for a, b in itertools.pairwise(cu_seqlens.tolist())
        ]
        assert largest(packed, torch.cat(alone, dim=1)) < 1e-10


def test_left_padding_changes_nothing_but_leaves_zeros() -> None:
    q, k, v = tensors(2, 12, 12, 2, 2, 8, 8, requires_grad=False)
    padded = attention(q, k, v, chunk=4, padding=torch.tensor([5, 0]))
    assert (padded[0, :5] == 0).all()
    assert largest(padded[0, 5:], attention(q[:1, 5:], k[:1, 5:], v[:1, 5:], chunk=4)[0]) < 1e-10
    assert largest(padded[1], attention(q[1:], k[1:], v[1:], chunk=4)[0]) < 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_queries_that_see_nothing_give_zeros_and_finite_gradients(backend: str) -> None:
    for sinks in (None, torch.zeros(2, dtype=torch.float64)):
        q, k, v = tensors(1, 4, 2, 2, 1, 8, 8)
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
        assert (out[:, :2] == 0).all()
        assert torch.isfinite(lse).all() if sinks is not None else torch.isneginf(lse[:, :2]).all()
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert torch.isfinite(gradient).all()
        empty = attention(q, k[:, :0], v[:, :0], sinks=sinks, backend=backend)
        assert (empty == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("see", [{}, {"window": 9}, {"soft_cap": 5.0}], ids=["causal", "window", "soft-cap"])
def test_low_precision_errs_at_most_twice_as_much_as_the_formula_in_it(dtype: torch.dtype, see: dict[str, Any]) -> None:
    torch.manual_seed(5)
    for new, keys in ((75, 75), (1, 75), (30, 75)):
        exact = tensors(2, new, keys, 4, 1, 60, 60, requires_grad=False)
        rounded = [x.to(dtype) for x in exact]
        truth = attention(*[x.double() for x in rounded], **see, backend="reference")
        errors = {b: largest(attention(*rounded, **see, backend=b).double(), truth) for b in ("torch", "reference")}
        assert errors["torch"] <= 2 * errors["reference"] + 1e-7, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 4, 64, 64), (8, 4, 64, 64), (8, 1, 64, 64), (4, 2, 24, 16), (8, 8, 256, 128)])
@pytest.mark.parametrize("keys", [1, 40, 600])
def test_a_step_errs_at_most_twice_as_much_as_the_formula(
    keys: int, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    for with_sinks, soft_cap, see in itertools.product((False, True), (None, 3.0), ({}, {"window": 500})):
        inputs = tensors(2, 1, keys, *sizes, dtype=dtype, requires_grad=False)
        sinks = torch.randn(sizes[0], dtype=dtype) if with_sinks else None
        wide = None if sinks is None else sinks.double()
        options: dict[str, Any] = {"soft_cap": soft_cap, **see}
        truth = attention(*[x.double() for x in inputs], sinks=wide, **options, backend="reference")
        out, formula = (attention(*inputs, sinks=sinks, **options, backend=b) for b in ("auto", "reference"))
        assert (out.dtype, out.shape) == (dtype, truth.shape)
        assert largest(out, truth) <= 2 * largest(formula, truth) + (1e-12 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("see", [{}, {"window": 4}, {"chunk": 8}], ids=["causal", "window", "chunk"])
def test_meta_has_the_shape_and_counts_the_dense_rectangle(see: dict[str, Any]) -> None:
    for new, keys in ((6, 6), (1, 9), (3, 9)):
        q, k, v = tensors(2, new, keys, 6, 2, 16, 24, dtype=torch.bfloat16, device="meta", requires_grad=False)
        with FlopCounterMode(display=False) as counter:
            out, lse = attention(q, k, v, **see, return_lse=True)
        assert out.shape == (2, new, 6, 24)
        assert lse.shape == (2, new, 6)
        expected = dense_flops(batch=2, new_tokens=new, keys=keys, heads=6, key_dim=16, value_dim=24)
        assert counter.get_total_flops() == expected


def test_the_operator_reports_visible_flops_to_the_counter() -> None:
    q, k, v = tensors(2, 30, 40, 6, 2, 16, 8, requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, window=7)
    cost = attention_cost(
        batch=2,
        new_tokens=30,
        keys=40,
        heads=6,
        kv_heads=2,
        key_dim=16,
        value_dim=8,
        window=7,
        element_bytes=8,
    )
    assert counter.get_total_flops() == cost.flops
    assert cost.activation_bytes == 2 * 30 * 6 * 24 * 8
    assert cost.state_bytes == 2 * (36 + 30) * 2 * 24 * 8


def test_counting_pairs_in_closed_form_equals_counting_the_mask() -> None:
    sizes = itertools.product((0, 1, 3, 17), (0, 1, 5, 16, 23), (None, 1, 4, 40), (None, 1, 7, 16), (0, 3, 7, 20))
    for new, keys, window, chunk, offset in sizes:
        settings = {"causal": True, "window": window, "chunk": chunk, "key_offset": offset}
        visible = attention_mask(new, keys, **settings)
        assert visible_pairs(new, keys, **settings) == int(visible.sum())
        seen = visible.any(dim=1).nonzero()
        assert reachable_keys(new, keys, **settings) == (keys - int(seen[0, 1]) if len(seen) else 0)
    assert visible_pairs(3, 5, causal=False) == 15


@pytest.mark.parametrize("see", [{"window": 9}, {}, {"soft_cap": 3.0}], ids=["window", "continuation", "soft-cap"])
def test_torch_compile_takes_it_without_a_graph_break(see: dict[str, Any]) -> None:
    q, k, v = tensors(1, 30, 40, 2, 1, 16, 16)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, **see).square().sum()  # type: ignore[union-attr]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss))
    assert all(largest(a, b) < 1e-12 for a, b in zip(mine, theirs, strict=True))


def test_explain_names_the_backend_and_what_stood_against_the_faster_one() -> None:
    q, k, _ = tensors(1, 4, 4, 2, 1, 8, 8)
    choice = explain(q, k)
    assert choice.backend == "torch"
    assert choice.rejected["triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*HEADS.values(), (6, 2, 64, 32)])
def test_a_prompt_long_enough_for_products_of_its_own_equals_the_formula(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows that do not divide the prompt, of tensors cut out of a wider one, no worse than torch's fused kernel."""
    heads, kv_heads, key_dim, value_dim = sizes
    torch.manual_seed(0)
    wide = torch.randn(2, 901, kv_heads, 2 * key_dim + value_dim).to(dtype)
    _, k, v = wide.split([key_dim, key_dim, value_dim], dim=-1)
    q = torch.randn(2, 901, heads, key_dim).to(dtype)
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    with torch.no_grad():
        assert prompt.serves(q, k, v)
        mine = attention(q, k, v)
        monkeypatch.setattr(prompt, "MOST_THREADS", 0)
        fused = attention(q, k, v)
    assert mine.dtype == dtype
    assert largest(mine, exact) <= 2 * largest(fused, exact)


def test_gradients_short_prompts_and_wider_types_are_left_to_the_fused_kernel() -> None:
    q, k, v = tensors(1, 400, 400, 2, 1, 8, 8, dtype=torch.float32)
    assert not prompt.serves(q, k, v)
    q, k, v = (x.detach() for x in (q, k, v))
    assert prompt.serves(q, k, v)
    assert not prompt.serves(q[:, :100], k[:, :100], v[:, :100])
    assert not prompt.serves(q.double(), k.double(), v.double())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window": 0}, "window is 0; it must be at least 1"),
    "chunk-not-causal": ({"chunk": 4, "causal": False}, "a chunk looks back only"),
    "key-offset": ({"key_offset": -1}, "key_offset is -1"),
    "sinks": ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]"),
    "padding": ({"padding": torch.zeros(3, dtype=torch.int64)}, r"padding has shape \[3\]"),
    "packed-batch": ({"cu_seqlens": torch.tensor([0, 4])}, "packed sequences are one row"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda'"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_with_field_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention(*tensors(2, 4, 4, 2, 1, 8, 8), **settings)


def test_heads_that_kv_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="5 heads over 2 kv_heads: kv_heads must divide heads"):
        attention(*tensors(1, 4, 4, 5, 2, 8, 8))


def test_triton_asked_for_on_the_cpu_is_refused_and_never_replaced() -> None:
    with pytest.raises(BackendError, match="triton"):
        attention(*tensors(1, 4, 4, 2, 1, 8, 8), backend="triton")
