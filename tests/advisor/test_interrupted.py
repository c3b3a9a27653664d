"""Killed, stopped, run twice at once, out of room: a folder holds the old answer or the new one, and the user is told which."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from archcompass.advisor.advise import write_all
from archcompass.blocks.model.files import write_texts
from archcompass.errors import FileFormatError
from archcompass.profiles import calibrate as calibration

NAMES = ("workload.yaml", "model.yaml", "report.json", "report.html")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
WRITER = """
import sys
from pathlib import Path
from archcompass.advisor.advise import write_all
folder, letter, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for _ in range(rounds):
    write_all(folder, {name: letter * 1_000_000 for name in sys.argv[4:]})
"""


def writer(folder: Path, letter: str, rounds: int) -> subprocess.Popen[bytes]:
    """A process that writes the four files of an answer again and again, each a million times its letter."""
    command = [sys.executable, "-P", "-c", WRITER, str(folder), letter, str(rounds), *NAMES]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def letters(folder: Path) -> list[str]:
    """The letter each file is made of, whole."""
    found = [(folder / name).read_text() for name in NAMES]
    assert all(text == text[0] * 1_000_000 for text in found), "a file is half-written"
    return [text[0] for text in found]


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_every_file_is_whole(seed: int, tmp_path: Path) -> None:
    write_all(tmp_path, dict.fromkeys(NAMES, "a" * 1000000))
    with writer(tmp_path, "b", 10_000) as process:
        time.sleep(random.Random(seed).uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
    assert set(letters(tmp_path)) <= {"a", "b"}
    write_all(tmp_path, dict.fromkeys(NAMES, "c" * 1000000))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES), "the next writer sweeps"


def test_two_at_once_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    processes = [writer(tmp_path, letter, 60) for letter in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(set(letters(tmp_path))) == 1, "one answer, whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
def test_an_advice_killed_at_any_moment_leaves_the_answer_from_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_all(out, dict.fromkeys(NAMES, "old"))
    words = ["advise", "--context", "1k", "--gpu", "cpu", "--vram", "1GB", "--seconds", "1", "-o", str(out)]
    for seconds in (random.Random(7).uniform(0.2, 6.0) for _ in range(3)):
        command = [sys.executable, "-P", "-m", "archcompass", *words]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=-3, stderr=-3) as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        kept = {name: (out / name).read_text() for name in NAMES}
        assert set(kept.values()) == {"old"} or json.loads(kept["report.json"])["recommendation"]


def stopping(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


STOPPED = {
    "advise": (["advise", "--gpu", "l4", "-o", "out"], "out is as it was"),
    "advise, nothing kept": (["advise", "--gpu", "l4"], "nothing was kept"),
    "calibrate": (["calibrate"], "the table from before stays"),
    "anything else": (["verify", "mamba-130m"], "nothing was left half-written"),
}


@pytest.mark.parametrize(("words", "said"), STOPPED.values(), ids=STOPPED)
def test_ctrl_c_says_what_was_kept(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    from archcompass.advisor import advise
    from archcompass.profiles import verify

    monkeypatch.chdir(tmp_path)
    for module, name in ((advise, "advise"), (calibration, "calibrate"), (verify, "verify")):
        monkeypatch.setattr(module, name, stopping)
    done = cli(*words)
    assert done.code == 130
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_a_set_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    """The operating system refuses the third file's last bytes, as a full disk does."""
    write_texts(tmp_path, dict.fromkeys(NAMES, "old"))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n" + WRITER.replace(
        "letter * 1_000_000", 'letter * (10 if name != "report.json" else 1_000_000)'
    )
    command = [sys.executable, "-P", "-c", limited, str(tmp_path), "b", "1", *NAMES]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "report.json cannot be written: File too large" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(NAMES, "old")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]], ids=["screen", "json", "markdown"])
def test_an_answer_that_cannot_be_printed_is_one_line(form: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "archcompass", "recommend", "--gpu", "l4", *form]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["archcompass: the output cannot be written: No space left on device"]


def test_a_calibration_is_written_whole_or_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archcompass.profiles import tables
    from archcompass.profiles.efficiency import PROCESSOR
    from archcompass.profiles.measure.here import this_machine

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = this_machine("cpu")
    assert tables.save(PROCESSOR, here).is_file()
    assert len(list((tmp_path / "archcompass").iterdir())) == 1
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FileFormatError, match="cannot be made"):
        tables.save(PROCESSOR, here)
    tables.forget()
