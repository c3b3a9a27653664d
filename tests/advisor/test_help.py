"""Help as a manual: every command has an example that its own parser understands; completion and the version work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text

from archcompass import __version__
from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.commands import COMMANDS, register

HELP = (Path(__file__).resolve().parent.parent.parent / "docs" / "cli.md").read_text()


def page_of(name: str) -> str:
    """The quoted help of one command; that it is what the program prints is another test's."""
    found = re.search(rf"<!-- quote: archcompass {name} --help -->\n```text\n(.*?)^```", HELP, re.S | re.M)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_that_parses(name: str) -> None:
    prose = page_of(name).split("╭")[0].replace("\n ", " ")
    examples = re.findall(
        rf"archcompass {name}(?: [^\n]*?)?(?=\s{{2,}}|\s*$|\s+archcompass)", prose.split("Example", 1)[1]
    )
    assert examples
    register([name])
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for example in examples:
        command.make_context(name, shlex.split(example)[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_and_argument_is_explained(name: str) -> None:
    register([name])
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert not [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_part_of_a_flags_explanation_is_taken_for_a_style(name: str) -> None:
    register([name])
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    told = [getattr(parameter, "help", None) or "" for parameter in command.params]
    assert [Text.from_markup(text).plain for text in told] == [text.replace("\\[", "[") for text in told]


def test_the_version_is_the_packages() -> None:
    command = [sys.executable, "-P", "-m", "archcompass", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"archcompass {__version__}\n"


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [("archcompass rec", 1, "recommend"), ("archcompass export --mod", 2, "--model-type")],
    ids=["a command", "a flag"],
)
def test_a_shell_completes(words: str, at: int, offered: str) -> None:
    script = Path(sys.executable).parent / "archcompass"
    asked = os.environ | {"COMP_WORDS": words, "COMP_CWORD": str(at), "_ARCHCOMPASS_COMPLETE": "complete_bash"}
    done = subprocess.run([script], env=asked, capture_output=True, text=True, check=True)
    assert offered in done.stdout.split()
