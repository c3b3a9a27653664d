"""Multi-head latent attention: its two forms agree, and the indexer picks what its formula says."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from archcompass.blocks.base import TINY_WIDTH, Step
from archcompass.blocks.mla.spec import MLA
from archcompass.blocks.runtime import Context, initialise

BASE: dict[str, Any] = {
    "num_attention_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
INDEXED = BASE | {"indexer": {"n_heads": 16, "head_dim": 12, "topk": 6}}


def build(said: dict[str, Any]):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        module = MLA.model_validate(said).build(TINY_WIDTH)
    finally:
        torch.set_default_dtype(torch.float32)
    initialise(module)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


def test_absorbed_and_expanded_are_one_formula() -> None:
    module = build(BASE)
    x, context = torch.randn(2, 9, TINY_WIDTH, dtype=torch.float64), Context(padding=torch.tensor([0, 2]))
    with torch.inference_mode():
        query, _, rows = module._project(x, context)
        expanded, absorbed = module._expanded(query, rows, context), module._absorbed(query, rows, context)
    torch.testing.assert_close(absorbed, expanded)


def test_each_call_takes_the_cheaper_form() -> None:
    deepseek = MLA(
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    assert not deepseek.absorbs(4096, 4096)
    assert deepseek.absorbs(1, 4096)
    assert deepseek.absorbs(4, 100_000)
    assert deepseek.parameters(7168).total == 187_107_328
    step = sum(op.flops * op.count for op in deepseek.work(7168, Step(new_tokens=1, past_tokens=32768)))
    assert step < 2 * deepseek.parameters(7168).total + 2.1 * 32768 * 128 * (576 + 512)


def test_the_indexer_keeps_the_best_keys_of_its_formula() -> None:
    module = build(INDEXED)
    x, context = torch.randn(1, 15, TINY_WIDTH, dtype=torch.float64), Context()
    with torch.inference_mode():
        _, query_latent, latent = module._project(x, context)
        keys = module.indexer.keys(x, context)
        scores, index, counts = module.indexer(x, query_latent, {"latent": latent, "index_key": keys}, context)
        query = module.indexer._turn(module.indexer.query(query_latent).unflatten(-1, (16, 12)), context)
        weights = module.indexer.weights(x) / 4
        full = torch.einsum("bth,bths->bts", weights, torch.relu(torch.einsum("bthd,bsd->bths", query, keys) / 12**0.5))
    for t in range(15):
        best = full[0, t, : t + 1].topk(min(6, t + 1))
        assert index[0, t][counts[0, t]].tolist() == best.indices.tolist()
        torch.testing.assert_close(scores[0, t][counts[0, t]], best.values)


def test_a_generous_indexer_changes_nothing() -> None:
    indexed = build(INDEXED | {"indexer": {"n_heads": 16, "head_dim": 12, "topk": 40}})
    plain = build(BASE)
    plain.load_state_dict({k: v for k, v in indexed.state_dict().items() if not k.startswith("indexer")})
    x = torch.randn(2, 15, TINY_WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(indexed(x)[0], plain(x)[0])
        torch.testing.assert_close(indexed.train()(x, None, Context(keep_state=False))[0], plain(x)[0])


def test_the_indexer_learns_to_rank_as_attention_does() -> None:
    """A few steps on its own loss bring its ranking closer, and touch no other weight."""
    module = build(INDEXED).train()
    x = torch.randn(2, 24, TINY_WIDTH, dtype=torch.float64)
    optimiser = torch.optim.Adam(module.indexer.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        context = Context(keep_state=False)
        module(x, None, context)
        (loss,) = context.losses["indexer"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for name, p in module.named_parameters() if not name.startswith("indexer"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_lora_rank": None, "bias": True}, "bias needs q_lora_rank"),
        ({"q_lora_rank": None} | {"indexer": INDEXED["indexer"]}, "indexer needs q_lora_rank"),
        ({"indexer": {"n_heads": 2, "head_dim": 4, "topk": 5}}, "at least qk_rope_head_dim"),
        ({"qk_rope_head_dim": 7}, "must be even"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MLA.model_validate(BASE | changes)
