"""Keeps what the documentation quotes from the program true.

A line `<!-- quote: archcompass recommend examples/chat-bot.yaml -->` is followed by a fenced block; this script runs the
command (100 columns, no colour) and writes its output into the block. `--check` changes nothing and exits with 1 when a
block is out of date. `<!-- session: archcompass gpus l4 ; archcompass models mamba-130m -->` quotes several commands with
their prompts.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUOTE = re.compile(
    r"(<!-- (?P<kind>quote|session): (?P<command>archcompass [^\n]*?) -->\n```[a-z]*\n)(?P<body>.*?)(^```$)",
    re.S | re.M,
)


def documents() -> list[Path]:
    """Every Markdown file that quotes the program."""
    return [
        path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if QUOTE.search(path.read_text())
    ]


def run(command: str) -> str:
    """What the command prints on stdout, trailing blanks removed."""
    from archcompass.advisor.cli.app import run as start

    before, out = (sys.argv, dict(os.environ), Path.cwd()), io.StringIO()
    sys.argv = shlex.split(command)
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERMINAL_WIDTH": "100"}
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            start()
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
        os.chdir(before[2])
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines()) + "\n"


def refreshed(text: str) -> str:
    """The document with every quoted block made anew."""
    return QUOTE.sub(lambda found: found[1] + said(found["kind"], found["command"]) + "```", text)


def said(kind: str, command: str) -> str:
    """The body of a block: an output alone, or a session of commands, each after its prompt."""
    if kind == "quote":
        return run(command)
    return "\n".join(f"$ {line}\n{run(line)}" for line in command.split(" ; "))


def main() -> int:
    """Writes, or with `--check` only compares; the number of stale documents is the exit code."""
    stale = [path for path in documents() if refreshed(path.read_text()) != path.read_text()]
    for path in stale:
        if "--check" not in sys.argv[1:]:
            path.write_text(refreshed(path.read_text()))
        sys.stderr.write(f"{path.relative_to(ROOT)} was out of date\n")
    return len(stale) if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
