"""The questions, their order, and what an interview knows so far. No input, no output: a terminal or a test drives it.

At most ten questions, after what an expert asks first: what comes out, how long one sequence is, whether exact items must be
found again, where the knowledge lives, which card, how many at once. A question that the earlier answers have settled is not
asked, and once no open answer can change the family only those that decide the size are: the card, how many sequences at
once, and whether it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from archcompass.advisor.workload import Workload
from archcompass.errors import InputError, nearest

Answers = Mapping[str, Any]

DECIDE_SIZES = frozenset({"gpu", "concurrency", "mode"})
"""Questions asked even when the family is settled."""

SIGNAL_TASKS = ("forecast", "detect", "transcribe", "control", "generate", "classify", "embed")


@dataclass(frozen=True, slots=True)
class Option:
    """One answer: what is shown, and the workload keys it sets."""

    label: str
    sets: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        key: the workload key it is about.
        text: the question.
        why: one line, why we ask.
        more: what `?` explains.
        options: the answers offered, the default first.
        free: the key whose value may be typed instead, or None.
        leans: whether the default is what the answers so far make usual, rather than the first option.
        asked: whether it still matters, given the answers so far.
    """

    key: str
    text: str
    why: str
    more: str
    options: tuple[Option, ...]
    free: str | None = None
    leans: bool = False
    asked: Callable[[Answers], bool] = lambda _: True

    def after(self, answers: Answers) -> Question:
        """The question with its usual answer, as the earlier ones have it, in the first place."""
        if not self.leans:
            return self
        usual = getattr(Workload(**answers), self.key)
        return replace(self, options=tuple(sorted(self.options, key=lambda option: option.sets[self.key] != usual)))

    @property
    def default(self) -> Option:
        """What Enter takes."""
        return self.options[0]


def _choices(key: str, **labels: str) -> tuple[Option, ...]:
    return tuple(Option(label, {key: value.replace("_", "-")}) for value, label in labels.items())


def _is_signal(answers: Answers) -> bool:
    return answers.get("task") in SIGNAL_TASKS


QUESTIONS: tuple[Question, ...] = (
    Question(
        key="task",
        text="What should come out of the model?",
        why="It decides whether you need a language model at all, and how much must be written.",
        more="Detecting, forecasting and classifying rarely need a large decoder; signals change the family more than length.",
        options=_choices(
            "task",
            chat="a conversation",
            qa="answers to questions",
            rag="answers from documents you supply",
            code="code",
            agent="actions of an agent",
            reason="long chains of reasoning",
            summarize="summaries",
            extract="fields taken from documents",
            translate="translations",
            detect="alarms on a stream",
            forecast="forecasts of a series",
            transcribe="text from speech",
            classify="labels",
        ),
    ),
    Question(
        key="modality",
        text="What goes in?",
        why="Signals and homogeneous logs suit recurrent models; text with exact words does not.",
        more="A modality other than text also changes the vocabulary, and with it the smallest model that makes sense.",
        options=_choices(
            "modality",
            text="text",
            logs="log lines",
            time_series="a time series",
            sensors="sensor readings",
            audio="audio",
            genome="genomes",
            video="video",
        ),
        leans=True,
        asked=_is_signal,
    ),
    Question(
        key="context",
        text="How long is one input, at the 95th percentile?",
        why="Attention's cache and its square grow with it; recurrent state does not.",
        more="In tokens; a page of English is about 500. Decide on the 95th percentile: retrieval serves a rare giant better.",
        options=(
            Option("up to 16k tokens (30 pages)", {"context": "16k"}),
            Option("up to 4k tokens (8 pages)", {"context": "4k"}),
            Option("up to 32k tokens", {"context": "32k"}),
            Option("up to 128k tokens (a book)", {"context": "128k"}),
            Option("up to 1M tokens", {"context": "1M"}),
            Option("it never ends", {"context": "unbounded", "stream": True}),
        ),
        free="context",
    ),
    Question(
        key="recall",
        text="Must the model find and repeat exact items from its input?",
        why="A fixed-size state cannot copy what it has not kept; only attention can look anything up.",
        more="Numbers, names, clauses, log lines. If a wrong digit matters, say 'exactly'.",
        options=_choices(
            "recall",
            medium="sometimes",
            none="no",
            low="rarely",
            high="often, and it should cite them",
            exact="exactly, every time",
        ),
        leans=True,
    ),
    Question(
        key="breadth",
        text="How many unrelated subjects must it know?",
        why="Facts follow the total number of parameters; experts add parameters without adding time.",
        more="One product is narrow, one profession moderate, a company's whole business broad, everything encyclopedic.",
        options=_choices(
            "breadth",
            moderate="a few",
            narrow="one",
            broad="many",
            encyclopedic="all of them",
        ),
    ),
    Question(
        key="knowledge",
        text="Where does the knowledge live?",
        why="Knowledge in documents asks for a good reader; knowledge in the weights asks for many parameters.",
        more="Documents can be changed and cited tomorrow; weights cannot.",
        options=_choices(
            "knowledge",
            documents="in documents it will be given",
            weights="in the model itself",
            both="in both",
        ),
        asked=lambda answers: answers.get("breadth") in ("broad", "encyclopedic") and not answers.get("stream"),
    ),
    Question(
        key="accuracy",
        text="What does a wrong answer cost?",
        why="It sets the lowest precision we may use, and how much maturity should weigh.",
        more="'Uncompromising' keeps weights at 8 bits or more and prefers the most mature family on short inputs.",
        options=_choices(
            "accuracy",
            standard="little",
            high="a lot",
            uncompromising="too much to allow one",
        ),
    ),
    Question(
        key="gpu",
        text="Which card, and how many?",
        why="Everything is sized against its memory and its bandwidth.",
        more="As you would write it: 'RTX 4090', '2x H100 SXM', 'M4 Max', 'cpu'. `archcompass gpus` lists what is known.",
        options=(
            Option("RTX 4090, 24 GB", {"gpu": "rtx-4090"}),
            Option("RTX 5090, 32 GB", {"gpu": "rtx-5090"}),
            Option("L4, 24 GB", {"gpu": "l4"}),
            Option("H100 SXM, 80 GB", {"gpu": "h100-sxm"}),
            Option("8x H100 SXM", {"gpu": "8x h100-sxm"}),
            Option("Jetson Orin Nano, 8 GB", {"gpu": "orin-nano-8"}),
            Option("no card, this CPU", {"gpu": "cpu"}),
        ),
        free="gpu",
    ),
    Question(
        key="concurrency",
        text="How many sequences are alive at the same moment?",
        why="Each holds its own cache; past some number the cache, not the weights, sets the speed.",
        more="Not registered users: about 3 % of them are active at once.",
        options=(
            Option("8", {"concurrency": 8}),
            Option("1", {"concurrency": 1}),
            Option("32", {"concurrency": 32}),
            Option("200", {"concurrency": 200}),
        ),
        free="concurrency",
        leans=True,
    ),
    Question(
        key="mode",
        text="Will you run a trained model, fine-tune one, or train from nothing?",
        why="Training needs several times the memory, and routers and recurrent kernels are fragile under adapters.",
        more="Fine-tuning on one card favours dense models.",
        options=_choices("mode", inference="run it", finetuning="fine-tune it", training="train it"),
    ),
)


@dataclass(slots=True)
class Interview:
    """The answers so far, and what comes next.

    Attributes:
        start: answers given beforehand (flags, a file); their questions are not asked.
        hurried: whether only what decides the size is still asked.
    """

    start: dict[str, Any] = field(default_factory=dict)
    hurried: bool = False
    _given: list[tuple[Question, dict[str, Any]]] = field(default_factory=list)

    @property
    def answers(self) -> dict[str, Any]:
        """All keys set so far."""
        merged = dict(self.start)
        for _, sets in self._given:
            merged |= sets
        return merged

    @property
    def open(self) -> list[Question]:
        """Questions that are still asked, in order."""
        return [question for question in self.unanswered if not self.hurried or question.key in DECIDE_SIZES]

    @property
    def unanswered(self) -> list[Question]:
        """Questions that the answers so far leave open, whether they are still asked or not."""
        done = {question.key for question, _ in self._given} | set(self.start)
        answers = self.answers
        left = [question for question in QUESTIONS if question.key not in done and question.asked(answers)]
        return [question.after(answers) for question in left]

    @property
    def number(self) -> int:
        """One-based number of the current question."""
        return len(self._given) + 1

    @property
    def workload(self) -> Workload:
        """The workload as far as it is known; what is not known has its default."""
        return Workload(**self.answers)

    def take(self, option: Option) -> None:
        """Takes an offered answer to the current question."""
        self._give(dict(option.sets))

    def type(self, text: str) -> None:
        """Takes what was typed: an option's number or value, or a value of the question's own key.

        Raises:
            InputError: it is neither; names what would do.
        """
        question, text = self.open[0], text.strip()
        if not text:
            return self.take(question.default)
        if text.isdigit() and 1 <= int(text) <= len(question.options) and question.free != "concurrency":
            return self.take(question.options[int(text) - 1])
        offered = {str(option.sets[question.key]): option for option in question.options}
        word = "-".join(text.lower().split())
        if word in offered:
            return self.take(offered[word])
        if question.free is None:
            close = nearest(text, offered, count=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(f"{question.key} is {text!r}; choose {', '.join(offered)}{hint}")
        Workload(**self.answers | {question.free: text})
        return self._give({question.free: text})

    def back(self) -> None:
        """Takes the last answer back; at the first question it does nothing."""
        self.hurried = False
        if self._given:
            self._given.pop()

    def _give(self, sets: dict[str, Any]) -> None:
        self._given.append((self.open[0], sets))


def settled(interview: Interview, family_of: Callable[[Workload], str]) -> bool:
    """Whether no single answer still open changes the family. Asks the engine itself, one answer at a time."""
    answers = interview.answers
    now = family_of(interview.workload)
    return all(
        family_of(Workload(**answers | dict(option.sets))) == now
        for question in interview.unanswered
        for option in question.options[1:]
    )
