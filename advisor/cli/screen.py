"""The questionnaire on a screen: arrow keys, one question at a time, the ranking at the foot."""

from __future__ import annotations

from dataclasses import dataclass
from shutil import get_terminal_size
from textwrap import fill
from typing import Any

from prompt_toolkit import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.layout import FormattedTextControl, Layout, Window
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from archcompass.advisor.cli import ranking
from archcompass.advisor.questionnaire import QUESTIONS, Interview
from archcompass.errors import InputError

STYLE = Style.from_dict({"question": "bold", "dim": "#888888", "chosen": "bold reverse", "error": "bold ansired"})


@dataclass(slots=True)
class Page:
    """What the screen shows: the interview, the option under the cursor, what is being typed, and a word in between."""

    interview: Interview
    at: int = 0
    typed: str = ""
    said: str = ""
    is_error: bool = False

    def move(self, by: int) -> None:
        self.at = (self.at + by) % len(self.interview.open[0].options)
        self.typed = self.said = ""

    def enter(self) -> None:
        """Takes what was typed, else the option under the cursor."""
        if self.typed.lower() in ("b", "back"):
            return self.back()
        try:
            if self.typed:
                self.interview.type(self.typed)
            else:
                self.interview.take(self.interview.open[0].options[self.at])
        except InputError as error:
            self.said, self.is_error, self.typed = str(error), True, ""
        else:
            self.at, self.typed, self.said = 0, "", ""
        return None

    def jump(self, letter: str) -> None:
        """To the next option that begins with a letter, as lists do."""
        options = self.interview.open[0].options
        after = [*range(self.at + 1, len(options)), *range(self.at + 1)]
        self.at = next((at for at in after if options[at].label.lower().startswith(letter.lower())), self.at)
        self.said = ""

    def back(self) -> None:
        self.interview.back()
        self.at, self.typed, self.said = 0, "", ""

    def explain(self) -> None:
        self.said, self.is_error = self.interview.open[0].more, False

    def text(self) -> StyleAndTextTuples:
        """The page."""
        question = self.interview.open[0]
        lines: StyleAndTextTuples = [
            ("class:question", f"\n {self.interview.number}. {question.text}"),
            ("class:dim", f"   (at most {len(QUESTIONS)})\n{_wrapped('why we ask: ' + question.why)}\n\n"),
        ]
        for number, option in enumerate(question.options):
            here = number == self.at and not self.typed
            default = "   (default)" if number == 0 else ""
            lines.append(("class:chosen" if here else "", f"  {'>' if here else ' '} {option.label} "))
            lines.append(("class:dim", f"{default}\n"))
        if question.free:
            lines.append(("", f"\n    or type a {question.free}: {self.typed}"))
            lines.append(("class:chosen", " \n") if self.typed else ("", "\n"))
        if self.said:
            lines.append(("class:error" if self.is_error else "", f"\n{_wrapped(self.said)}\n"))
        lines.append(("class:dim", f"\n    {ranking.line(self.interview)}\n"))
        lines.append(("class:dim", "    arrows move · Enter takes · b or left back · ? explains · Ctrl-C stops\n"))
        return lines


def _wrapped(text: str) -> str:
    """A sentence within the terminal, indented."""
    columns = min(get_terminal_size().columns, 100) - 2
    return fill(text, columns, initial_indent="    ", subsequent_indent="    ")


def play(interview: Interview) -> None:
    """Plays the interview to its end; the cursor starts on each question's default."""
    page = Page(interview)
    application: Application[None] = Application(
        layout=Layout(Window(FormattedTextControl(page.text), wrap_lines=True)),
        key_bindings=_keys(page),
        style=STYLE,
        full_screen=False,
        erase_when_done=True,
        output=create_output(always_prefer_tty=True),
    )
    if not _done(interview):
        application.run()


def _done(interview: Interview) -> bool:
    return ranking.is_settled(interview)


def _keys(page: Page) -> KeyBindings:
    keys = KeyBindings()

    @keys.add("up")
    def _(_: Any) -> None:
        page.move(-1)

    @keys.add("down")
    def _(_: Any) -> None:
        page.move(1)

    @keys.add("enter")
    def _(event: Any) -> None:
        page.enter()
        if _done(page.interview):
            event.app.exit()

    @keys.add("left")
    def _(_: Any) -> None:
        page.back()

    @keys.add("c-c")
    def _(event: Any) -> None:
        event.app.exit(exception=KeyboardInterrupt)

    @keys.add("backspace")
    def _(_: Any) -> None:
        page.typed = page.typed[:-1]

    @keys.add("<any>")
    def _(event: Any) -> None:
        _press(page, event.data)

    return keys


def _press(page: Page, key: str) -> None:
    """A printable key. Where nothing can be typed `b` goes back at once; else it may begin a name, and Enter decides."""
    if not page.typed and key == "?":
        return page.explain()
    if not page.interview.open[0].free:
        return page.back() if key == "b" else page.jump(key)
    if key.isprintable():
        page.typed, page.said = page.typed + key, ""
    return None
