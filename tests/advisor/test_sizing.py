"""Sizes: shapes a GPU likes, ladders that only grow, the biggest that fits and meets the times, real models."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from archcompass.advisor.decide import Decision, family_of
from archcompass.advisor.derived import cache_bytes_per_token, constant_state_bytes, derived, t_speed
from archcompass.advisor.recommend import recommend
from archcompass.advisor.sensitivity import decision_map, flips
from archcompass.advisor.sizing.adapters import adapter_memory
from archcompass.advisor.sizing.search import fits, in_times, size
from archcompass.advisor.sizing.shapes import FAMILIES, Style, build_spec, ladder
from archcompass.advisor.workload import Workload
from archcompass.blocks.model.files import parse, to_yaml
from archcompass.profiles.hardware import find
from archcompass.profiles.ledger import memory
from archcompass.profiles.request import Request

STYLES = {
    "dense": Style(family="transformer", vocab_size=131072),
    "windowed": Style(family="transformer", vocab_size=131072, window=1024, full_every=6),
    "experts": Style(family="moe", vocab_size=131072, experts=128, chosen=8),
    "signal experts": Style(family="moe", vocab_size=256, experts=16, chosen=2),
    "recurrent": Style(family="ssm", vocab_size=131072),
    "hybrid": Style(family="hybrid", vocab_size=131072, period=4),
    "hybrid with experts": Style(family="hybrid", vocab_size=131072, period=8, experts=128, chosen=8),
}


def sized(family: str, **said: Any) -> Any:
    decision = Decision.of(Workload(**said))
    return size(decision.styles[family], decision.ask), decision.ask  # type: ignore[index]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_ladder_only_grows(style: Style) -> None:
    rungs = ladder(style)
    counts = [build_spec(style, rung).parameters().total for rung in rungs]
    assert counts == sorted(set(counts))
    assert counts[0] < 5e7
    assert counts[-1] > 2e11
    for batch, prompt in ((1, 100), (300, 600), (8, 2**17)):
        request = Request(batch=batch, prompt=prompt, generate=10)
        held = [memory(build_spec(style, rung), request, find("rtx-4090")).per_card_bytes for rung in rungs]
        assert held == sorted(held)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_large_shapes_are_what_a_gpu_likes(style: Style) -> None:
    for rung in ladder(style):
        if rung.width >= 1024:
            spec = build_spec(style, rung)
            assert rung.width % 128 == 0
            assert spec.vocab_size % 128 == 0
            for block in spec.blocks.values():
                sizes = block.model_dump()
                assert sizes.get("head_dim", 128) in (64, 128)
                assert sizes.get("intermediate_size", 256) % 256 == 0
                assert sizes.get("moe_intermediate_size", 64) % 64 == 0


def test_a_hybrid_has_the_share_of_attention_that_recall_asks_for() -> None:
    for recall, share in (("exact", 1 / 4), ("low", 1 / 8)):
        found, _ = sized("hybrid", context="128k", recall=recall, gpu="h100-sxm")
        counts = found.spec.counts
        assert counts["attention"] / found.spec.num_hidden_layers == share


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_rung_would_not_have_done(family: str) -> None:
    found, ask = sized(family, context="16k", gpu="l40s", concurrency=4)
    rungs = ladder(found.style)
    larger = rungs[rungs.index(found.shape) + 1]
    assert fits(found.style, found.shape, ask, found.precision)
    grown = fits(found.style, larger, ask.grown, ask.precisions[0])
    assert not (grown and in_times(found.style, larger, ask, found.precision))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_candidate_is_a_model_that_builds_and_survives_its_yaml(family: str) -> None:
    answer = recommend(Workload(context="32k", gpu="rtx-4090", concurrency=2), quick=True)
    spec = next(candidate.model for candidate in answer.candidates if candidate.family == family)
    import yaml

    assert parse(yaml.safe_load(to_yaml(spec))) == spec
    model = spec.build(device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters().total


def test_a_time_that_was_asked_for_is_met_by_a_smaller_model() -> None:
    fast, ask = sized("transformer", context="4k", gpu="rtx-4090", concurrency=1, tokens_per_second=150)
    slow, _ = sized("transformer", context="4k", gpu="rtx-4090", concurrency=1, tokens_per_second=20)
    assert fast.spec.parameters().total < slow.spec.parameters().total
    assert fast.bound == "time"
    assert 1e3 / fast.times.paced_ms(ask) >= 150


def test_a_time_that_nothing_meets_is_told_with_the_factor() -> None:
    answer = recommend(Workload(context="64k", gpu="l4", ttft_ms=1), quick=True)
    assert all(candidate.misses["ttft_ms"] > 1 for candidate in answer.candidates if candidate.fits)
    assert any("is missed" in sentence for sentence in answer.contradictions)


def test_a_precision_that_was_asked_for_is_kept() -> None:
    found, _ = sized("transformer", precision="q4_k_m", gpu="rtx-3090")
    assert found.precision == "q4_k_m"


@pytest.mark.parametrize(
    ("said", "floor"),
    [
        ({"concurrency": 2}, "int4"),
        ({"concurrency": 64}, "fp8"),
        ({"concurrency": 2, "accuracy": "uncompromising"}, "fp8"),
        ({"concurrency": 2, "context": "128k", "recall": "high"}, "fp8"),
        ({"concurrency": 2, "gpu": "cpu"}, "q4_k_m"),
        ({"concurrency": 2, "gpu": "gb10"}, "nvfp4"),
        ({"concurrency": 64, "gpu": "rtx-3090"}, "int8"),
        ({"mode": "training"}, "bf16"),
        ({"mode": "finetuning"}, "int4"),
        ({"task": "detect", "stream": True}, "int8"),
    ],
)
def test_the_floor_of_precision_follows_the_evidence(said: dict[str, Any], floor: str) -> None:
    assert Decision.of(Workload(**{"gpu": "rtx-4090"} | said)).ask.precisions[0] == floor


def test_adapters_take_what_was_measured() -> None:
    """QLoRA of 7 to 8B was measured between 6 and 14 GB; torchtune at 2 x 2,048 tokens, with a chunked loss, 7.4 GB."""
    style = STYLES["dense"]
    rung = next(rung for rung in ladder(style) if 7.5e9 < build_spec(style, rung).parameters().total < 8.6e9)
    held = adapter_memory(build_spec(style, rung), Request(batch=2, prompt=2048, precision="int4"), find("rtx-4090"))
    assert 6e9 < held.per_card_bytes < 14e9


def test_training_says_tokens_and_days() -> None:
    answer = recommend(Workload(mode="training", context="8k", gpu="8x h100-sxm"), quick=True)
    assert answer.pick.precision == "bf16"
    assert answer.pick.training is not None
    assert 0 < answer.pick.training["days"] <= 60


def test_several_cards_say_how_the_model_is_split_and_what_links_cost() -> None:
    split = recommend(Workload(gpu="8x h100-sxm", breadth="encyclopedic"), quick=True).pick.split
    assert split is not None
    assert split["cards"] == 8
    assert 0 < split["link_share"] < 1
    assert recommend(Workload(gpu="h100-sxm"), quick=True).pick.split is None


def test_where_cache_and_weights_are_equal_the_predictor_reads_as_much_of_both() -> None:
    found, ask = sized("transformer", context="8k", gpu="h100-sxm", concurrency=8)
    tokens = t_speed(found, ask)
    assert tokens is not None
    cache = cache_bytes_per_token(found, ask) * tokens * 8
    weights = ask.request(found.precision).weight_precision.bytes(found.spec.parameters().active)
    assert cache == pytest.approx(weights)


def test_the_state_of_a_recurrence_is_constant_and_of_attention_it_grows() -> None:
    recurrent, ask = sized("ssm", context="8k", gpu="h100-sxm")
    attention, _ = sized("transformer", context="8k", gpu="h100-sxm")
    assert cache_bytes_per_token(recurrent, ask) == 0
    assert constant_state_bytes(recurrent, ask) > 1e6
    assert constant_state_bytes(attention, ask) == 0
    assert t_speed(recurrent, ask) is None


def test_every_derived_quantity_has_an_interval_around_its_value() -> None:
    decision = Decision.of(Workload(context="64k", gpu="l40s"))
    sizes = {family: size(decision.styles[family], decision.ask) for family in FAMILIES}
    found = derived(decision.ask, sizes)
    assert {"total KV", "effective context", "T_speed", "T*"} <= {quantity.name for quantity in found}
    for quantity in found:
        if quantity.value is not None and quantity.low is not None and quantity.high is not None:
            assert quantity.low <= quantity.value <= quantity.high


def test_one_more_attention_layer_costs_more_at_greater_length() -> None:
    def price(context: str) -> float:
        answer = recommend(Workload(context=context, gpu="h200", recall="exact", concurrency=1), quick=True)
        hybrid = next(candidate for candidate in answer.candidates if candidate.family == "hybrid")
        return next(m.memory_bytes for m in hybrid.marginal if m.what == "one more attention layer")

    assert price("256k") > 2 * price("32k")


def test_flips_name_the_edge_of_context() -> None:
    work = Workload(context="8k", gpu="rtx-4090", concurrency=1, recall="high")
    edge = next(flip for flip in flips(Decision.of(work)) if flip.key == "context" and flip.value != "unbounded")
    assert family_of(work.replace(context=edge.value)) == edge.family
    assert family_of(work.replace(context=int(edge.value / 1.1))) == family_of(work)


def test_a_map_shows_the_decision_over_two_inputs() -> None:
    contexts, breadths = [4096, 2**17, 2**20], ["narrow", "encyclopedic"]
    found = decision_map(Workload(gpu="8x h100-sxm"), "context", "breadth", columns=contexts, rows=breadths)
    assert found["cells"][0][0] == "transformer"
    assert found["cells"][1][0] == "moe"
    assert found["cells"][0][2] == "hybrid"
    assert found["here"] == {"context": 16384, "breadth": "moderate"}


def test_published_models_say_whether_they_fit_and_why() -> None:
    answer = recommend(Workload(context="8k", gpu="rtx-4090", concurrency=2))
    assert 3 <= len(answer.published) <= 5
    assert all(model.why and model.source for model in answer.published)
    assert any(model.fits and model.per_user for model in answer.published)
    assert not recommend(Workload(task="detect", stream=True, gpu="l4")).published


def test_open_models_take_no_more_bits_than_they_were_published_in() -> None:
    answer = recommend(Workload(task="qa", knowledge="documents", context="64k", concurrency=16, gpu="l40s"))
    published = {model.name: model.precision for model in answer.published}
    assert published["gpt-oss-20b"] == "mxfp4"
    assert published["nemotron-3-nano-30b-a3b"] == "fp8"


def test_nothing_on_the_front_is_beaten_and_the_best_quality_is_on_it() -> None:
    answer = recommend(Workload(context="16k", gpu="l40s", concurrency=4), quick=True, effort="high")
    assert len(answer.front) > 3
    for one in answer.front:
        assert not any(
            other.quality > one.quality and other.memory_bytes < one.memory_bytes and other.per_user > one.per_user
            for other in answer.front
        )
    best = max(c.quality["dense_equivalent_parameters"] for c in answer.candidates if c.fits and not c.vetoes)
    assert answer.front[0].quality >= best * (1 - 1e-9)
    assert {"ssm"}.isdisjoint(point.family for point in _front(recall="exact")), "a vetoed family is not on offer"


def _front(**said: Any) -> list[Any]:
    return recommend(Workload(context="16k", gpu="l40s", **said), quick=True, effort="high").front


def test_recommend_imports_no_torch() -> None:
    code = (
        "import sys; from archcompass.advisor.workload import Workload; from archcompass.advisor.recommend import recommend;"
        "recommend(Workload(context='64k')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recommend_is_quick() -> None:
    """100 ms of its own time on a free core; the bound here allows for a busy one."""
    spent = []
    for context in (50_000, 60_000, 70_000):
        started = time.process_time()
        recommend(Workload(context=context, gpu="l40s", breadth="broad"))
        spent.append(time.process_time() - started)
    assert min(spent) < 0.2
