"""One estimator stands behind every command: the same question has the same answer, whoever asks."""

import pytest

from archcompass.advisor.compare import compare
from archcompass.advisor.recommend import recommend
from archcompass.advisor.workload import Workload
from archcompass.profiles.profile import profile

ASKED = [
    Workload(context="32k", task="code", concurrency=4, gpu="h100-sxm"),
    Workload(context="8k", breadth="encyclopedic", concurrency=64, gpu="8x h100-sxm"),
    Workload(context="16k", breadth="encyclopedic", concurrency=1, gpu="2x rtx-3090", ram="256GB"),
]


@pytest.mark.parametrize("work", ASKED, ids=lambda work: work.gpu)
def test_recommend_profile_and_compare_say_the_same(work: Workload) -> None:
    points = {point.family: point for point in compare(work, values=(int(work.context),)).points}
    for candidate in recommend(work, quick=True).candidates:
        assert candidate.model is not None
        report = profile(
            candidate.model,
            gpu=work.gpu,
            precision=candidate.precision,
            batch=work.concurrency,
            prompt=candidate.speed["prompt"],
            generate=work.output,
            **candidate.runs,
        )
        entry, point = report.profiles[0], points[candidate.family]
        assert entry.prefill is not None
        assert entry.decode is not None
        said = [
            (candidate.memory["total_bytes"], entry.memory.total_bytes, point.memory_bytes),
            (candidate.speed["prefill_ms"], entry.prefill.ms, point.prefill_ms),
            (candidate.speed["decode_ms_per_token"], entry.decode.ms_per_token, point.decode_ms_per_token),
        ]
        for recommended, profiled, compared in said:
            assert profiled == pytest.approx(recommended, rel=1e-6)
            assert compared == pytest.approx(recommended, rel=1e-6)


@pytest.mark.parametrize("gpu", ["h100-sxm", "8x h100-sxm"])
def test_recommend_and_profile_say_the_same_of_training(gpu: str) -> None:
    work = Workload(context="8k", mode="training", gpu=gpu, concurrency=8)
    for candidate in recommend(work, quick=True).candidates:
        assert candidate.model is not None
        asked = {"gpu": gpu, "mode": "training", "batch": 8, "prompt": candidate.speed["prompt"]}
        held = profile(candidate.model, **asked, **candidate.runs).profiles[0].memory
        assert held.total_bytes == pytest.approx(candidate.memory["total_bytes"], rel=1e-6)
