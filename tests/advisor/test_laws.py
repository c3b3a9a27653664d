"""What must hold for every workload there is, whatever the rules' numbers are."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archcompass.advisor.decide import Decision
from archcompass.advisor.recommend import recommend
from archcompass.advisor.sizing.ask import MARGIN
from archcompass.advisor.sizing.search import size
from archcompass.advisor.sizing.shapes import FAMILIES
from archcompass.advisor.workload import Workload, choices
from archcompass.profiles.ledger import memory

QUADRATIC = {"transformer", "moe"}

CARDS = (
    "rtx-4090",
    "l4",
    "gb10",
    "8x h100-sxm",
    "2x h100-sxm",
    "orin-nano-8",
    "m2-ultra-76c",
    "mi300x",
    "t4",
    "tpu-v5e",
    "cpu",
)

WORDS = (
    "task",
    "modality",
    "breadth",
    "knowledge",
    "recall",
    "reasoning",
    "accuracy",
    "prefix_reuse",
    "precision",
    "ecosystem",
)

CONTEXTS = st.one_of(st.integers(1, 4096), st.integers(7, 23).map(lambda octave: 2**octave), st.just("unbounded"))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Any workload a person could mean, most keys given."""
    said: dict[str, Any] = {key: draw(st.sampled_from(choices(key))) for key in WORDS if draw(st.booleans())}
    said["context"] = draw(CONTEXTS)
    said["concurrency"] = draw(st.sampled_from([1, 2, 8, 33, 300, 1000]))
    said["gpu"] = draw(st.sampled_from(CARDS))
    said["mode"] = draw(st.sampled_from(["inference", "inference", "finetuning", "training"]))
    if said["mode"] == "training":
        said["precision"] = draw(st.sampled_from(["auto", "bf16"]))
    for key, values in {
        "stream": [True, False],
        "output": [1, 100, 4096, 32768],
        "corpus": [10_000, 20_000_000],
        "ttft_ms": [0.1, 50.0, 2000.0],
        "tokens_per_second": [1.0, 20.0, 300.0],
        "ram": [64 * 10**9],
    }.items():
        if draw(st.booleans()):
            said[key] = draw(st.sampled_from(values))
    return Workload(**said)


law = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@law
@given(workloads())
def test_every_workload_gets_four_ranked_candidates_or_a_refusal_with_a_reason(work: Workload) -> None:
    answer = recommend(work, quick=True)
    assert [candidate.rank for candidate in answer.candidates] == [1, 2, 3, 4]
    assert {candidate.family for candidate in answer.candidates} == set(FAMILIES)
    assert 0.0 < answer.confidence < 1.0
    assert all(rule.reason and 0.0 <= rule.strength <= 1.0 for rule in answer.rules)
    if answer.refusal is None:
        assert answer.pick.family == answer.family
        assert answer.pick.fits
    else:
        assert not any(candidate.fits for candidate in answer.candidates)
        assert answer.needs_bytes
        assert answer.nearest
    assert json.loads(json.dumps(answer.model_dump(), allow_nan=False))["family"] == answer.family


@law
@given(workloads())
def test_what_is_said_to_fit_fits_by_the_ledger_with_the_margin_free(work: Workload) -> None:
    decision = Decision.of(work)
    for family in FAMILIES:
        sized = size(decision.styles[family], decision.ask)
        if sized.fits and work.mode != "finetuning":
            held = memory(sized.spec, sized.request, decision.ask.hardware)
            assert held.per_card_bytes <= held.capacity_bytes * (1 - MARGIN)
        if not sized.fits:
            assert sized.times is None, "no speed is ever said of what does not fit"


@law
@given(workloads(), st.sampled_from([4e9, 12e9, 24e9, 48e9, 80e9]), st.sampled_from([1.1, 1.5, 2.0, 8.0]))
def test_more_memory_never_makes_a_family_smaller_or_unfit(work: Workload, vram: float, more: float) -> None:
    less, plenty = (Decision.of(work.replace(vram=int(size_bytes))) for size_bytes in (vram, vram * more))
    for family in FAMILIES:
        small, large = (size(decision.styles[family], decision.ask) for decision in (less, plenty))
        if small.fits:
            assert large.fits
            assert large.spec.parameters().total >= small.spec.parameters().total


@settings(law, max_examples=200)
@given(workloads(), st.sampled_from([4e9, 8e9, 24e9, 80e9]), st.sampled_from([1.1, 1.5, 2.0, 8.0]))
def test_more_memory_never_makes_the_answer_smaller_or_none(work: Workload, vram: float, more: float) -> None:
    less, plenty = (Decision.of(work.replace(vram=int(size_bytes))) for size_bytes in (vram, vram * more))
    if less.family is not None:
        assert plenty.family is not None
        small, large = (decision.sized(decision.family) for decision in (less, plenty))  # type: ignore[arg-type]
        assert small.fits
        assert large.fits
        assert large.spec.parameters().total >= small.spec.parameters().total


@settings(law, max_examples=8)
@given(workloads())
def test_what_comes_first_builds_and_has_the_parameters_it_says(work: Workload) -> None:
    pick = recommend(work, quick=True).pick
    model = pick.model.build(device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pick.parameters["total"]


@settings(law, max_examples=120)
@given(workloads(), CONTEXTS)
def test_a_longer_context_never_moves_towards_quadratic_families(work: Workload, other: int | str) -> None:
    lengths = sorted(
        {work.context, other}, key=lambda context: (context == "unbounded", context if isinstance(context, int) else 0)
    )
    families = [Decision.of(work.replace(context=length)).family for length in lengths]
    if families[0] not in QUADRATIC and families[0] is not None:
        assert families[-1] not in QUADRATIC


@settings(law, max_examples=120)
@given(workloads())
def test_a_wider_breadth_never_moves_away_from_experts(work: Workload) -> None:
    families = [Decision.of(work.replace(breadth=breadth)).family for breadth in choices("breadth")]
    if "moe" in families:
        assert set(families[families.index("moe") :]) == {"moe"}


@law
@given(workloads())
def test_the_same_input_gets_the_same_answer(work: Workload) -> None:
    again = Workload(**work.given)
    assert recommend(work, quick=True).model_dump() == recommend(again, quick=True).model_dump()


@settings(law, max_examples=25)
@given(workloads())
def test_flips_really_flip(work: Workload) -> None:
    answer = recommend(work)
    for flip in answer.flips:
        changed = Decision.of(work.replace(**{flip.key: flip.value}))
        assert changed.family == flip.family != answer.family
        assert not changed.distrust[flip.family], "nobody is told to change to what is vetoed"
