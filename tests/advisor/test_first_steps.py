"""A newcomer's path: every command of docs/first-steps.md, in its order, in an empty folder."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archcompass.advisor.cli.commands import COMMANDS

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PAGE = (DOCS / "first-steps.md").read_text()


@pytest.mark.slow
def test_a_newcomers_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from archcompass.advisor.cli.app import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.S)
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "first-steps.md", "exec"), {})
            continue
        for line in block.strip().splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            monkeypatch.setattr(sys, "stdin", io.StringIO(""))
            with pytest.raises(SystemExit) as stopped:
                run()
            assert not stopped.value.code, f"{line}: {capsys.readouterr().err}"
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "learns: held-out loss" in out
    assert int(out.strip().splitlines()[-1]) > 50_000, "what transformers counts in the trained folder"
    losses = [float(found) for found in re.findall(r"step \d+: loss ([\d.]+)", out)]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0] < 0.8 * 5.55, "transformers goes on from the trained weights"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "workload.yaml",
        "model.yaml",
        "report.json",
        "report.html",
    }


def test_every_command_has_its_help_in_the_documentation() -> None:
    text = (DOCS / "cli.md").read_text()
    for name in COMMANDS:
        assert f"<!-- quote: archcompass {name} --help -->" in text


def test_the_list_is_whole_whatever_ran_before(cli: Callable[..., Any]) -> None:
    shown = [cli(*words).out for words in (["--help"], ["gpus", "l4"], ["--help"], ["gpus", "l4"])]
    assert shown[0] == shown[2]
    assert shown[1] == shown[3]
    assert "memory" in shown[1]
