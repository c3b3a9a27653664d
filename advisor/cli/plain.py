"""The questionnaire over lines: pipes, logs, terminals without cursor control. One answer a line."""

from __future__ import annotations

import sys

from archcompass.advisor.cli import ranking
from archcompass.advisor.questionnaire import QUESTIONS, Interview, Question
from archcompass.errors import InputError


def play(interview: Interview) -> None:
    """Asks on stderr, reads stdin; the end of the input takes the defaults of all that is left."""
    told = False
    while not ranking.is_settled(interview):
        if interview.hurried and not told:
            _say("\nNo open answer can change the family any more; what follows decides the size.")
        told = interview.hurried
        question = interview.open[0]
        _show(question, interview)
        line = sys.stdin.readline()
        if not line:
            _say("(end of input: the rest keeps its default)")
            return
        _take(interview, question, line.strip())
    if interview.unanswered:
        _say("\nNo open answer can change the family any more; the rest keeps its default.")


def _take(interview: Interview, question: Question, text: str) -> None:
    if text.lower() in ("b", "back"):
        return interview.back()
    if text == "?":
        return _say(f"   {question.more}")
    try:
        interview.type(text)
    except InputError as error:
        _say(f"   {error}")
    return None


def _show(question: Question, interview: Interview) -> None:
    _say(f"\n{interview.number}. {question.text}   (at most {len(QUESTIONS)} questions)")
    _say(f"   why we ask: {question.why}")
    for number, option in enumerate(question.options, 1):
        _say(f"   {number}  {option.label}" + ("   [Enter]" if number == 1 else ""))
    typed = f", or type a {question.free}" if question.free else ""
    _say(f"   a number{typed}; Enter takes the first, b goes back, ? explains")
    _say(f"   {ranking.line(interview)}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
