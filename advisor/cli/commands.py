"""The list of commands, in the order `--help` shows them, and where each lives.

Only the command that is called is imported; `--help` makes do with the summaries here, which a test holds to the commands' own
first lines.
"""

from __future__ import annotations

import os
from importlib import import_module
from inspect import cleandoc
from typing import Any, NamedTuple

from archcompass.advisor.cli.app import app


class Command(NamedTuple):
    """Where a command lives, and its first line."""

    file: str
    summary: str


COMMANDS = {
    "ask": Command("ask", "At most ten questions, then the answer."),
    "recommend": Command(
        "recommend", "Which family fits, why, and what would change the answer; all four sized for your card."
    ),
    "advise": Command(
        "advise", "Recommend, build the pick from real blocks on this machine, profile it, report and export."
    ),
    "profile": Command(
        "profile", "Memory and speed of one model: predicted for a card, measured here, or both side by side."
    ),
    "compare": Command(
        "compare", "The four families at one budget over a sweep of context or batch, with the crossover points."
    ),
    "report": Command("report", "A saved report.json as one self-contained HTML page."),
    "diff": Command("report", "What changed between two answers, for a pull request. Exit 1 when something did."),
    "models": Command("catalogue", "Published models: parameters, cache per token, constant state, source."),
    "gpus": Command("catalogue", "Accelerators: memory, bandwidth, dense arithmetic, source."),
    "convert": Command("convert", "HF config.json to our YAML, and back; nothing is dropped in silence."),
    "verify": Command(
        "convert", "Round trip, parameters, FLOPs, state, decode equals forward; exit 1 on a difference."
    ),
    "export": Command("export", "A design for other tools: an HF folder, YAML with its schema, or a launch recipe."),
    "schema": Command("export", "The JSON Schema of a model's YAML, every registered block included."),
    "train": Command("train", "A short honest training run: loss curve, held-out loss, tokens/s, memory, checkpoints."),
    "calibrate": Command("calibrate", "Measure this machine and write its efficiency table for later predictions."),
    "doctor": Command("doctor", "Versions, devices, and which kernel serves which operation here, and why."),
}


_ASIDE: list[Any] = []
"""Commands that were loaded before only the list was asked for, in one and the same process."""


def register(arguments: list[str]) -> None:
    """Adds the command that `arguments` call; all of them for shell completion; the summaries when they call none."""
    loaded = [known for known in (*_ASIDE, *app.registered_commands) if known.callback is not _summary]
    app.registered_commands[:] = loaded
    _ASIDE.clear()
    called = next((word for word in arguments if not word.startswith("-")), None)
    if any(key.endswith("_COMPLETE") for key in os.environ if key.startswith("_ARCHCOMPASS")):
        for file in dict.fromkeys(command.file for command in COMMANDS.values()):
            import_module(f"archcompass.advisor.cli.{file}")
    elif called in COMMANDS:
        import_module(f"archcompass.advisor.cli.{COMMANDS[called].file}")
        for found in app.registered_commands:
            found.help = found.help or _flowing(found.callback.__doc__ or "")
    else:
        _ASIDE.extend(loaded)
        app.registered_commands.clear()
        for name, command in COMMANDS.items():
            app.command(name, help=command.summary)(_summary)


def _flowing(docstring: str) -> str:
    """A docstring as help: every paragraph is one line, which the terminal breaks where it must."""
    paragraphs = cleandoc(docstring).split("\n\n")
    return "\n\n".join(" ".join(text.split()) for text in paragraphs)


def _summary() -> None:
    """Stands for a command in the list."""
