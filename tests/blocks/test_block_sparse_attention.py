"""Block-sparse attention sees the blocks its definition names, and no others."""

from typing import Any

import pytest
import torch

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import TINY_WIDTH, Step
from archcompass.blocks.block_sparse_attention.spec import BlockSparseAttention
from archcompass.blocks.runtime import initialise

BASE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "block_size": 4}
TIME = 27


def build(spec: Any) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        module = spec.build(TINY_WIDTH)
    finally:
        torch.set_default_dtype(torch.float32)
    initialise(module)
    for parameter in module.parameters():
        parameter.data *= 8
    return module.eval()


def blocks_by_definition(said: dict[str, Any], t: int, scores: torch.Tensor) -> set[int]:
    """The blocks that the query at t sees, from the docstring's formula; scores [blocks] are q · mean(k)."""
    own = t // 4
    seen = {b for b in range(own + 1) if b > own - said.get("local_blocks", 1) or b < said.get("global_blocks", 0)}
    seen |= {b for b in range(own + 1) if "stride" in said and b % said["stride"] == 0}
    rest = [b for b in range(len(scores)) if b not in seen and (b + 1) * 4 <= t + 1]
    return seen | set(sorted(rest, key=lambda b: -scores[b].item())[: said.get("topk_blocks", 0)])


@pytest.mark.parametrize(
    "said",
    [
        {"topk_blocks": 2},
        {"local_blocks": 2, "global_blocks": 1},
        {"stride": 3},
        {"local_blocks": 2, "global_blocks": 2, "stride": 2, "topk_blocks": 1},
    ],
    ids=str,
)
def test_queries_see_the_blocks_of_the_definition(said: dict[str, Any]) -> None:
    module = build(BlockSparseAttention.model_validate(BASE | said | {"rope": None}))
    x = torch.randn(1, TIME, TINY_WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        y = module(x)[0]
        query, key, value = (part.unflatten(-1, (4, 16))[0] for part in module.qkv(x).split(64, dim=-1))
        means = key[: TIME // 4 * 4].unflatten(0, (-1, 4)).mean(1)
        out = torch.zeros(TIME, 4, 16, dtype=torch.float64)
        for t in range(TIME):
            for h in range(4):
                blocks = blocks_by_definition(said, t, means[:, h] @ query[t, h])
                keys = [j for j in range(t + 1) if j // 4 in blocks]
                out[t, h] = (key[keys, h] @ query[t, h] / 4).softmax(0) @ value[keys, h]
        torch.testing.assert_close(y[0], module.output(out.flatten(1)))


def test_with_room_for_every_block_it_is_attention() -> None:
    sparse = build(BlockSparseAttention.model_validate(BASE | {"topk_blocks": 20}))
    full = build(Attention(num_attention_heads=4, num_key_value_heads=4, head_dim=16))
    full.load_state_dict(sparse.state_dict())
    x = torch.randn(2, TIME, TINY_WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x)[0], full(x)[0])


def test_a_step_reads_little_of_a_long_cache() -> None:
    said = BASE | {"block_size": 64, "topk_blocks": 8}
    step = Step(new_tokens=1, past_tokens=100_000)
    sparse = sum(op.state_bytes for op in BlockSparseAttention.model_validate(said).work(64, step))
    full = sum(
        op.state_bytes for op in Attention(num_attention_heads=4, num_key_value_heads=4, head_dim=16).work(64, step)
    )
    assert sparse < 0.02 * full
