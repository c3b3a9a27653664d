"""How several cards share a model, and experts in system memory: the ledger, the predictor against measurements, the sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from archcompass.advisor.decide import Decision
from archcompass.advisor.recommend import recommend
from archcompass.advisor.sizing.search import size
from archcompass.advisor.workload import Workload
from archcompass.blocks import zoo
from archcompass.errors import InputError
from archcompass.profiles.hardware import find
from archcompass.profiles.ledger import memory
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request

LOAD = Request(batch=256, prompt=8192, generate=256, precision="fp8", kv_precision="fp8")
EIGHT = find("8x h100-sxm")


def test_data_parallel_copies_weights_and_not_the_cache_of_few_heads() -> None:
    spec = zoo.entry("qwen3-30b-a3b").spec
    tensor, data = (memory(spec, replace(LOAD, parallel=way), EIGHT) for way in ("tensor", "data"))
    assert tensor.state_bytes == pytest.approx(2 * data.state_bytes), "four key heads on eight cards are copied once"
    parameters = spec.parameters()
    beside = parameters.total - parameters.routed
    assert data.weights_bytes - tensor.weights_bytes == pytest.approx(7 * beside, rel=0.6)
    assert data.weights_bytes < 2 * tensor.weights_bytes, "experts are not copied"


def test_one_card_is_the_same_however_it_is_shared() -> None:
    spec, card = zoo.entry("qwen3-30b-a3b").spec, find("h100-sxm")
    ways = [predict(spec, replace(LOAD, batch=4, parallel=way), card) for way in ("tensor", "data")]
    assert ways[0].prefill_ms == ways[1].prefill_ms
    assert ways[0].memory == ways[1].memory


def test_sequences_that_do_not_divide_lie_on_the_fullest_card() -> None:
    spec = zoo.entry("llama-3.1-8b").spec
    nine, sixteen = (memory(spec, replace(LOAD, batch=batch, parallel="data"), EIGHT) for batch in (9, 16))
    assert nine.per_card_bytes == sixteen.per_card_bytes


def test_data_parallel_work_is_all_of_the_work() -> None:
    spec = zoo.entry("qwen3-30b-a3b").spec
    tensor, data = (predict(spec, replace(LOAD, parallel=way), EIGHT) for way in ("tensor", "data"))
    assert data.prefill_flops == pytest.approx(tensor.prefill_flops, rel=1e-6)


def test_training_shares_out_sequences_weights_and_moments() -> None:
    spec = zoo.entry("llama-3.1-8b").spec
    asked = Request(batch=64, prompt=4096, generate=0, mode="training", recompute="full", parallel="data")
    few, many = (memory(spec, asked, find(f"{count}x h100-sxm")) for count in (2, 64))
    assert not few.fits
    assert many.fits
    assert many.per_card_bytes < few.per_card_bytes / 4


@pytest.mark.parametrize(
    ("name", "request_", "per_second", "prefill"),
    [
        ("gpt-oss-120b", {"offload": 1.0, "precision": "mxfp4", "ram_bytes_per_second": 90e9}, 25.6, 134),
        ("qwen3-30b-a3b", {"offload": 0.75, "precision": "q4_k_m", "ram_bytes_per_second": 102e9}, 36.7, None),
    ],
)
def test_experts_in_system_memory_are_as_slow_as_was_measured(
    name: str, request_: dict[str, Any], per_second: float, prefill: float | None
) -> None:
    """Cards of 8 GB with experts in DDR5 or four channels of DDR4 under llama.cpp (evidence of the knowledge rule)."""
    found = predict(zoo.entry(name).spec, Request(prompt=1024, **request_), find("rtx-2080"))
    assert found.fits
    assert found.memory.system_bytes > 10e9
    assert found.tokens_per_second == pytest.approx(per_second, rel=0.25)
    if prefill:
        assert found.prefill_tokens_per_second == pytest.approx(prefill, rel=0.25)


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(InputError, match="offload is"):
        Request(offload=1.5)


def total(family: str, **said: Any) -> int:
    decision = Decision.of(Workload(task="qa", breadth="encyclopedic", knowledge="weights", context="4k", **said))
    return size(decision.styles[family], decision.ask).spec.parameters().total  # type: ignore[index]


def test_system_memory_makes_room_for_experts_of_one_user_and_for_nothing_else() -> None:
    card = {"gpu": "rtx-4090", "concurrency": 1}
    assert total("moe", **card, ram="96GB") > 1.5 * total("moe", **card)
    assert total("transformer", **card, ram="96GB") == total("transformer", **card)
    card["concurrency"] = 4
    assert total("moe", **card, ram="96GB") == total("moe", **card)
    assert total("moe", gpu="gb10", concurrency=1, ram="96GB") == total("moe", gpu="gb10", concurrency=1)


def test_more_system_memory_never_makes_experts_smaller() -> None:
    totals = [
        total("moe", gpu="rtx-3070", concurrency=1, ram=ram) for ram in ("16GB", "32GB", "64GB", "128GB", "512GB")
    ]
    assert totals == sorted(totals)


def test_a_cache_of_few_heads_over_many_cards_is_not_copied() -> None:
    work = Workload(task="rag", context="32k", output=400, gpu="8x h100-sxm", concurrency=1000, recall="high")
    pick = recommend(work, quick=True).pick
    assert pick.runs["parallel"] == "data"
    assert pick.split is not None
    assert pick.split["how"].startswith("data parallel over 8 cards")
    assert pick.parameters["total"] > 2e10


def test_sixty_four_cards_train_more_than_one_could() -> None:
    trained = {"mode": "training", "context": "8k", "concurrency": 64}
    many, one = (recommend(Workload(gpu=gpu, **trained), quick=True).pick for gpu in ("64x h100-sxm", "h100-sxm"))
    assert many.parameters["total"] > 10 * one.parameters["total"]
    assert many.split is not None
    assert "fully sharded" in many.split["how"]
