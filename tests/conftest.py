"""What tests of several floors share: the command line in this process, and one thread."""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unicodedata import category

import pytest


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `archcompass` with these words; whatever it says can be printed, and bad input is refused in one line."""
    from archcompass.advisor.cli.app import run

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["archcompass", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            run()
        out, err = capsys.readouterr()
        assert not {letter for letter in out + err if category(letter)[0] == "C" and letter not in "\n\t"}
        code = stopped.value.code if isinstance(stopped.value.code, int) else 0
        if code == 2:
            assert len(err.strip().splitlines()) == 1, err
        return Done(code, out, err)

    return call


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """With one thread the clock is this process's own work, which other work on the machine does not lengthen."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quiet_transformers() -> None:
    """No advice and no progress bars of transformers among the warnings that are errors here."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
