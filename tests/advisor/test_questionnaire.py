"""The interview: at most ten questions, defaults, typed answers, the way back."""

import pytest

from archcompass.advisor.cli.ranking import is_settled
from archcompass.advisor.cli.screen import Page
from archcompass.advisor.questionnaire import QUESTIONS, Interview, settled
from archcompass.advisor.workload import Workload
from archcompass.errors import InputError


def play_defaults(interview: Interview) -> None:
    while interview.open:
        interview.take(interview.open[0].default)


def test_there_are_at_most_ten_questions_and_each_says_why() -> None:
    assert len(QUESTIONS) <= 10
    assert all(question.why.endswith(".") and question.more.endswith(".") for question in QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.key)
def test_every_offered_answer_is_a_sound_workload(question: object) -> None:
    for option in question.options:  # type: ignore[attr-defined]
        assert set(Workload(**option.sets).given) == set(option.sets)


def test_defaults_all_the_way_make_the_default_workload() -> None:
    interview = Interview()
    play_defaults(interview)
    assert interview.workload.task == "chat"
    assert interview.workload.context == 16384


def test_signals_are_asked_for_their_modality_and_chats_are_not() -> None:
    interview = Interview()
    interview.type("detect")
    assert interview.open[0].key == "modality"
    interview.back()
    interview.type("chat")
    assert "modality" not in {question.key for question in interview.open}


@pytest.mark.parametrize(("task", "usual"), [("detect", "none"), ("chat", "medium"), ("rag", "high"), ("code", "high")])
def test_the_usual_need_for_recall_is_what_enter_takes(task: str, usual: str) -> None:
    interview = Interview(start={"task": task, "context": "4k", "modality": "text" if task != "detect" else "logs"})
    assert interview.open[0].key == "recall"
    interview.type("")
    assert interview.workload.recall == usual


def test_the_usual_signal_is_what_enter_takes_and_words_may_have_spaces() -> None:
    for typed in ("", "time series", "Time-Series"):
        interview = Interview()
        interview.type("forecast")
        interview.type(typed)
        assert interview.workload.modality == "time-series"


def test_an_endless_input_sets_the_stream_and_skips_where_knowledge_lives() -> None:
    interview = Interview()
    interview.type("chat")
    interview.type("6")
    assert interview.workload.stream
    assert "knowledge" not in {question.key for question in interview.open}


def test_a_wrong_answer_names_the_right_ones_and_changes_nothing() -> None:
    interview = Interview()
    with pytest.raises(InputError, match="did you mean 'chat'"):
        interview.type("chatt")
    assert interview.number == 1
    interview.type("")
    with pytest.raises(InputError, match="context"):
        interview.type("minus four")
    assert interview.open[0].key == "context"


def test_numbers_may_be_typed_with_their_unit() -> None:
    interview = Interview()
    interview.type("rag")
    interview.type("200k")
    assert interview.workload.context == 204800


def test_back_takes_the_last_answer_back_and_stops_at_the_first() -> None:
    interview = Interview()
    interview.back()
    interview.type("code")
    interview.type("4k")
    interview.back()
    assert interview.open[0].key == "context"
    interview.back()
    assert interview.answers == {}


def test_what_flags_have_said_is_not_asked() -> None:
    interview = Interview(start={"gpu": "l4", "task": "chat"})
    assert {"gpu", "task"}.isdisjoint(question.key for question in interview.open)


def test_it_is_settled_only_when_no_open_answer_changes_the_family() -> None:
    interview = Interview(start={"task": "chat"})
    assert settled(interview, lambda _: "moe")
    assert not settled(interview, lambda workload: "ssm" if workload.recall == "none" else "hybrid")


def test_a_letter_moves_to_the_next_answer_that_begins_with_it() -> None:
    page = Page(Interview(start={"task": "detect"}))
    options = page.interview.open[0].options
    page.jump("s")
    assert options[page.at].label == "sensor readings"
    page.jump("q")
    assert options[page.at].label == "sensor readings", "no answer begins with it"


def test_a_settled_family_leaves_only_what_decides_the_size_and_back_opens_the_rest() -> None:
    interview = Interview()
    interview.type("detect")
    interview.type("")
    interview.type("unbounded")
    interview.hurried = True
    assert [question.key for question in interview.open] == ["gpu", "concurrency", "mode"]
    interview.back()
    assert interview.open[0].key == "context"


def test_another_card_opens_what_was_settled() -> None:
    interview = Interview(start={"task": "agent", "context": "128k", "recall": "low"})
    is_settled(interview)
    assert [question.key for question in interview.open] == ["gpu", "concurrency", "mode"]
    interview.type("8x h100-sxm")
    is_settled(interview)
    assert "breadth" in [question.key for question in interview.open], "there is room for experts now"
