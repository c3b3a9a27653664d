"""The advisor beside an expert: shared workloads with an answer, and the plain statements of the four rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from archcompass.advisor.decide import Decision, family_of
from archcompass.advisor.recommend import recommend
from archcompass.advisor.rules import findings
from archcompass.advisor.workload import Workload

SCENARIOS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "scenarios.json").read_text(encoding="utf-8")
)["scenarios"]

OWN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "expert_scenarios.json").read_text(encoding="utf-8")
)["scenarios"]

FAMILIES = {scenario["id"]: family_of(Workload(**scenario["workload"])) for scenario in SCENARIOS}


def share(holds: list[bool]) -> float:
    return sum(holds) / len(holds)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["id"])
def test_no_family_that_an_expert_calls_wrong_comes_first(scenario: dict[str, Any]) -> None:
    assert FAMILIES[scenario["id"]] not in scenario["wrong"]


def test_an_expert_accepts_nine_answers_in_ten() -> None:
    assert share([FAMILIES[scenario["id"]] in scenario["acceptable"] for scenario in SCENARIOS]) >= 0.9


def test_seven_answers_in_ten_are_the_experts_first_choice() -> None:
    assert share([FAMILIES[scenario["id"]] == scenario["family"] for scenario in SCENARIOS]) >= 0.7


# What an expert would run, in billions of parameters in all, and the formats named. From the scenarios' "size" and "precision".
EXPERT = {
    "S01": ((8, 16), {"int4"}),
    "S02": ((30, 122), {"fp8"}),
    "S03": ((0.005, 0.1), {"int8"}),
    "S06": ((0.6, 4), {"int4", "int8"}),
    "S07": ((235, 355), {"fp8"}),
    "S11": ((20, 40), {"fp8"}),
    "S13": ((8, 16), {"int4", "fp8"}),
    "S15": ((0.3, 1.2), {"fp8"}),
    "S16": ((7, 14), {"int4"}),
    "S18": ((75, 140), {"mxfp4", "nvfp4"}),
    "S21": ((3, 4.5), {"fp8"}),
    "S26": ((0.0001, 0.005), {"int8"}),
    "S29": ((0.00001, 0.002), {"fp16", "int8"}),
    "S34": ((7, 10), {"int4", "int8"}),
    "S36": ((10, 16), {"fp8"}),
    "S38": ((8, 30), {"fp8"}),
}


def test_size_and_precision_lie_in_the_experts_range_in_seven_answers_of_ten() -> None:
    right = []
    for scenario in SCENARIOS:
        answer = recommend(Workload(**scenario["workload"]), quick=True)
        pick = next(one for one in answer.candidates if one.family == scenario["family"])
        (low, high), formats = EXPERT[scenario["id"]]
        right.append(low * 1e9 <= pick.parameters["total"] <= high * 1e9 and pick.precision in formats)
    assert share(right) >= 0.7


@pytest.mark.parametrize("scenario", OWN, ids=lambda scenario: scenario["id"])
def test_our_own_scenarios_get_an_acceptable_family(scenario: dict[str, Any]) -> None:
    assert scenario["why"]
    assert family_of(Workload(**scenario["workload"])) in scenario["acceptable"]


def test_our_own_scenarios_get_the_first_choice_and_a_size_in_range_in_four_of_five() -> None:
    first, sized = [], []
    for scenario in OWN:
        answer = recommend(Workload(**scenario["workload"]), quick=True)
        pick = next(one for one in answer.candidates if one.family == scenario["family"])
        low, high = scenario["billions"]
        first.append(answer.family == scenario["family"])
        sized.append(low * 1e9 <= pick.parameters["total"] <= high * 1e9 and pick.precision in scenario["precision"])
    assert share(first) >= 0.8
    assert share(sized) >= 0.8


def families(**said: Any) -> str | None:
    return family_of(Workload(**said))


@pytest.mark.parametrize("context", ["1k", "4k", "16k", "32k"])
@pytest.mark.parametrize("gpu", ["rtx-4090", "h100-sxm", "l40s"])
def test_short_and_uncompromising_is_a_transformers(context: str, gpu: str) -> None:
    assert families(context=context, accuracy="uncompromising", gpu=gpu) == "transformer"


@pytest.mark.parametrize("gpu", ["8x h100 sxm", "h200", "gb10", "2x rtx 4090"])
@pytest.mark.parametrize("task", ["chat", "qa"])
def test_the_most_varied_knowledge_with_memory_to_hold_it_is_for_experts(gpu: str, task: str) -> None:
    assert families(task=task, breadth="encyclopedic", knowledge="weights", gpu=gpu) == "moe"


@pytest.mark.parametrize("modality", ["logs", "sensors", "time-series", "audio"])
@pytest.mark.parametrize("context", ["unbounded", "1M", "8M"])
def test_endless_and_very_long_streams_are_a_state_space_models(modality: str, context: str) -> None:
    assert families(task="detect", modality=modality, context=context, stream=True, gpu="l4") == "ssm"


@pytest.mark.parametrize("recall", ["none", "low"])
def test_endless_text_that_need_not_be_quoted_is_a_state_space_models(recall: str) -> None:
    assert families(context="unbounded", stream=True, recall=recall) == "ssm"


@pytest.mark.parametrize("gpu", ["rtx-4090", "2x h100 sxm", "8x h100 sxm"])
@pytest.mark.parametrize("context", ["128k", "256k", "1M"])
def test_everything_at_once_is_a_hybrids(gpu: str, context: str) -> None:
    asked = {"breadth": "encyclopedic", "recall": "exact", "reasoning": "high", "accuracy": "high"}
    assert families(context=context, concurrency=4, gpu=gpu, **asked) in ("hybrid", None)


@pytest.mark.parametrize(
    ("rule", "wins", "loses"),
    [
        ("maximum-quality", {"context": "4k", "accuracy": "uncompromising"}, {"context": "256k"}),
        ("bottomless-knowledge", {"breadth": "encyclopedic", "gpu": "h200"}, {"breadth": "narrow", "context": "2k"}),
        (
            "infinite-memory",
            {"task": "detect", "context": "unbounded", "modality": "sensors"},
            {"context": "unbounded", "recall": "exact"},
        ),
        ("hybrids", {"context": "128k", "recall": "exact", "breadth": "broad"}, {"context": "2k"}),
    ],
)
def test_every_rule_wins_somewhere_and_loses_somewhere(rule: str, wins: dict[str, Any], loses: dict[str, Any]) -> None:
    assert findings(Decision.of(Workload(**wins)).reading)[0].rule == rule
    assert findings(Decision.of(Workload(**loses)).reading)[0].rule != rule


def test_a_rule_shows_its_arithmetic_and_its_evidence_on_both_sides() -> None:
    for finding in findings(Decision.of(Workload()).reading):
        assert finding.terms
        assert {"supports"} < {evidence.effect for evidence in finding.evidence}
        assert all(evidence.source and evidence.grade in "ABC" for evidence in finding.evidence)


def test_exact_recall_vetoes_a_state_space_model_and_not_a_hybrid() -> None:
    vetoed = {veto.family: veto.name for veto in Decision.of(Workload(recall="exact", context="64k")).vetoes}
    assert vetoed == {"ssm": "exact recall"}


def test_a_platform_without_kernels_vetoes_recurrence_where_tools_must_be_mature() -> None:
    mature = Decision.of(Workload(context="256k", gpu="tpu-v6e", ecosystem="mature", concurrency=1))
    assert {veto.family for veto in mature.vetoes if veto.name == "no kernel"} == {"ssm", "hybrid"}
    assert not Decision.of(Workload(context="256k", gpu="tpu-v6e", concurrency=1)).vetoes


def test_memory_vetoes_by_name() -> None:
    tight = Decision.of(Workload(context="16k", vram="1GB"))
    assert {veto.name for veto in tight.vetoes} == {"memory"}


def test_an_archive_beyond_any_context_gets_retrieval_first() -> None:
    answer = recommend(Workload(task="rag", corpus="20 million", context="64k"), quick=True)
    assert answer.notes[0].startswith("Retrieval first")
    assert recommend(Workload(task="rag", corpus=100_000, context="128k"), quick=True).notes[:1] != answer.notes[:1]


@pytest.mark.parametrize("task", ["forecast", "detect", "classify", "embed"])
def test_no_language_model_is_said_where_none_is_needed(task: str) -> None:
    assert any(re.search("needs no", note) for note in recommend(Workload(task=task), quick=True).notes)


def test_breadth_without_room_is_told_as_a_contradiction() -> None:
    answer = recommend(Workload(breadth="encyclopedic", knowledge="weights", vram="8GB"), quick=True)
    assert any("consider retrieval" in sentence for sentence in answer.contradictions)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    answer = recommend(Workload(context="1M", concurrency=64, vram="1GB", recall="exact"))
    assert answer.refusal is not None
    assert answer.refusal.startswith("No family fits: the smallest useful model")
    assert "Nearest:" in answer.refusal
    assert answer.needs_bytes is not None
    enough = Workload(context="1M", concurrency=64, vram=int(answer.needs_bytes * 1.05), recall="exact")
    assert recommend(enough, quick=True).refusal is None


def test_confidence_falls_near_a_boundary_and_outside_the_evidence() -> None:
    clear = recommend(Workload(context="2k", recall="high", breadth="narrow", concurrency=1), quick=True).confidence
    near = recommend(Workload(context="44k", recall="high", breadth="narrow", concurrency=1), quick=True).confidence
    beyond = recommend(
        Workload(context="unbounded", recall="low", breadth="narrow", concurrency=1), quick=True
    ).confidence
    assert clear > 0.75
    assert near < clear - 0.15
    assert beyond < clear - 0.15
