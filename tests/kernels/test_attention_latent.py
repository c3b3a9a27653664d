"""Absorbed latent attention against the heads it stands for, and block-sparse attention against a mask."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import BackendError, InputError
from archcompass.kernels.attention import (
    attention,
    latent_attention,
    latent_attention_cost,
    sparse_attention,
    sparse_attention_cost,
)

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("new", [1, 4, 30])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_absorbed_attention_equals_the_expanded_heads(new: int, backend: str) -> None:
    torch.manual_seed(0)
    rank, rope, heads, width, value, keys = 12, 4, 5, 8, 6, 30
    latents = torch.randn(2, keys, rank + rope, **F64)
    up_key, up_value = torch.randn(heads, rank, width, **F64), torch.randn(heads, rank, value, **F64)
    q, q_rope = torch.randn(2, new, heads, width, **F64), torch.randn(2, new, heads, rope, **F64)
    latent, rope_key = latents[..., :rank], latents[..., rank:]
    k = torch.einsum("btr,hrd->bthd", latent, up_key)
    k = torch.cat((k, rope_key.unsqueeze(2).expand(-1, -1, heads, -1)), dim=-1)
    v = torch.einsum("btr,hrd->bthd", latent, up_value)
    expanded = attention(torch.cat((q, q_rope), dim=-1), k, v, scale=0.3)
    absorbed = torch.cat((torch.einsum("bthd,hrd->bthr", q, up_key), q_rope), dim=-1)
    attended = latent_attention(absorbed, latents, rank, scale=0.3, backend=backend)
    assert torch.allclose(torch.einsum("bthr,hrd->bthd", attended, up_value), expanded, atol=1e-10)


def test_latent_gradients_and_padding_are_those_of_the_formula() -> None:
    torch.manual_seed(1)
    q, latents = torch.randn(2, 9, 3, 10, **F64, requires_grad=True), torch.randn(2, 9, 10, **F64, requires_grad=True)
    results = []
    for backend in ("torch", "reference"):
        out = latent_attention(q, latents, 7, scale=0.5, padding=torch.tensor([0, 4]), backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, latents))])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results, strict=True))


def test_the_counter_agrees_with_the_cost_of_a_latent_step() -> None:
    q, latents = torch.empty(3, 1, 4, 20, device="meta"), torch.empty(3, 50, 20, device="meta")
    with FlopCounterMode(display=False) as counter:
        assert latent_attention(q, latents, 16, scale=1.0).shape == (3, 1, 4, 16)
    cost = latent_attention_cost(batch=3, new_tokens=1, keys=50, heads=4, rank=16, rope_dim=4, element_bytes=2)
    assert counter.get_total_flops() == cost.flops
    assert cost.state_bytes == 3 * 51 * 20 * 2


def chosen(batch: int, new: int, kv_heads: int, count: int, slots: int) -> Tensor:
    blocks = torch.rand(batch, new, kv_heads, count).topk(slots).indices
    blocks[:, ::3, :, 0] = -1
    return blocks


@pytest.mark.parametrize(("new", "keys"), [(1, 37), (20, 37), (37, 37)])
def test_gathering_the_chosen_blocks_equals_masking_the_others(new: int, keys: int) -> None:
    torch.manual_seed(2)
    q, k = torch.randn(2, new, 6, 8, **F64, requires_grad=True), torch.randn(2, keys, 2, 8, **F64, requires_grad=True)
    v = torch.randn(2, keys, 2, 5, **F64, requires_grad=True)
    blocks = chosen(2, new, 2, 8, 3)
    results = []
    for backend in ("torch", "reference"):
        out, lse = sparse_attention(q, k, v, blocks, 5, backend=backend)
        results.append([out, lse.exp(), *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results, strict=True))


def test_choosing_every_block_is_causal_attention_and_two_halves_merge_into_it() -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 24, 4, 8, **F64), torch.randn(1, 24, 1, 8, **F64), torch.randn(1, 24, 1, 8, **F64)
    every = torch.arange(6).expand(1, 24, 1, 6)
    whole = attention(q, k, v)
    assert torch.allclose(sparse_attention(q, k, v, every, 4)[0], whole, atol=1e-10)
    halves = [sparse_attention(q, k, v, part, 4) for part in (every[..., :3], every[..., 3:])]
    total = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(out * torch.exp(lse - total).unsqueeze(-1) for out, lse in halves)
    assert torch.allclose(merged, whole, atol=1e-10)


def test_few_gathered_keys_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 10, 2, 4, **F64), torch.randn(1, 30, 2, 4, **F64), torch.randn(1, 30, 2, 4, **F64)
    blocks = chosen(1, 10, 2, 6, 2)
    before = sparse_attention(q, k, v, blocks, 5)[0]
    monkeypatch.setattr("archcompass.kernels.attention.sparse.GATHERED_ELEMENTS", 1)
    assert torch.equal(sparse_attention(q, k, v, blocks, 5)[0], before)


def test_the_cost_of_sparse_attention_is_what_the_counter_sees() -> None:
    q, k = torch.empty(2, 7, 6, 8, device="meta"), torch.empty(2, 40, 2, 8, device="meta")
    blocks = torch.empty(2, 7, 2, 3, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        sparse_attention(q, k, k, blocks, 5)
    cost = sparse_attention_cost(
        batch=2, new_tokens=7, heads=6, kv_heads=2, key_dim=8, value_dim=8, slots=3, block_size=5, element_bytes=2
    )
    assert counter.get_total_flops() == cost.flops


def test_what_cannot_be_is_refused() -> None:
    q, latents = torch.zeros(1, 2, 3, 8), torch.zeros(1, 5, 8)
    with pytest.raises(InputError, match="rank is 8; it must lie between 1 and 7"):
        latent_attention(q, latents, 8, scale=1.0)
    with pytest.raises(InputError, match="latent_attention takes"):
        latent_attention(q, latents[..., :4], 2, scale=1.0)
    with pytest.raises(BackendError, match="triton"):
        latent_attention(q, latents, 6, scale=1.0, backend="triton")
    k, blocks = torch.zeros(1, 5, 3, 8), torch.zeros(1, 2, 3, 1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"blocks must be \[1, 2, 3, slots\]"):
        sparse_attention(q, k, k, blocks[:, :1], 4)
    with pytest.raises(InputError, match="block_size is 0"):
        sparse_attention(q, k, k, blocks, 0)
