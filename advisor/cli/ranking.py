"""The ranking so far, for the foot of a question."""

from __future__ import annotations

from archcompass.advisor.decide import family_of
from archcompass.advisor.questionnaire import Interview, settled
from archcompass.advisor.recommend import recommend
from archcompass.advisor.workload import Workload
from archcompass.errors import ArchcompassError

_answers: dict[Workload, tuple[str, ...]] = {}


def families(workload: Workload) -> tuple[str, ...]:
    """The families in their order for `workload`, those that do not fit last; asked once for each workload."""
    if workload not in _answers:
        _answers[workload] = _ask(workload)
    return _answers[workload]


def _ask(workload: Workload) -> tuple[str, ...]:
    try:
        answer = recommend(workload, quick=True)
    except ArchcompassError:
        return ("nothing fits",)
    ranked = sorted(answer.candidates, key=lambda candidate: candidate.rank)
    return tuple(candidate.family for candidate in ranked)


def line(interview: Interview) -> str:
    """'so far: hybrid > moe > transformer > ssm'."""
    return "so far: " + " > ".join(families(interview.workload))


def is_settled(interview: Interview) -> bool:
    """Whether no open answer can change the family any more; then only what decides the size is still asked for.

    Judged anew after every answer: another card or load may open what was settled.
    """
    interview.hurried = settled(interview, lambda workload: family_of(workload) or "nothing fits")
    return interview.hurried and not interview.open
