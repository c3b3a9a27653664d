"""Hub ids: the configuration alone is fetched, from a hub that lives in this process; what goes wrong is one clear line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from archcompass.blocks.hf import to_config
from archcompass.blocks.model.files import load
from archcompass.blocks.zoo import published
from archcompass.errors import FileFormatError, InputError

ORG = "some-org/Some.Model-7B"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """What was asked of the hub, which knows one model and keeps code beside its configuration."""
    snapshot = tmp_path / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    config = to_config(published("llama-3.1-8b")) | {"auto_map": {"AutoConfig": "evil.Config"}}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "evil.py").write_text("raise SystemExit('ran')")
    seen: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str) -> str:
        seen.append((repo_id, filename))
        return str(snapshot / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return seen


def test_a_hub_id_is_a_model(asked: list[tuple[str, str]]) -> None:
    spec = load(ORG)
    assert spec.parameters() == published("llama-3.1-8b").parameters()
    assert spec.name == "Some.Model-7B"
    assert asked == [(ORG, "config.json")]


def test_a_folder_of_that_name_is_read_and_nothing_is_asked(
    asked: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ORG).mkdir(parents=True)
    (tmp_path / ORG / "config.json").write_text(json.dumps(to_config(published("mamba-130m"))))
    assert load(ORG).parameters() == published("mamba-130m").parameters()
    assert asked == []


@pytest.mark.parametrize(
    "name", ["../precious", "a/b/c", "/no/such/file", "org/", "/model", "org/mo del", "o\u0301rg/x"]
)
def test_what_cannot_be_an_id_is_never_asked_for(name: str, asked: list[tuple[str, str]]) -> None:
    with pytest.raises(InputError, match="no file or folder here"):
        load(name)
    assert asked == []


def raising(error: type[Exception]) -> Callable[[str, str], str]:
    """A hub that refuses in this way."""

    def download(_repo: str, _file: str) -> str:
        raise error.__new__(error)

    return download


REFUSALS = {
    "no such model": (errors.RepositoryNotFoundError, "is not known"),
    "gated": (errors.GatedRepoError, "gated"),
    "offline": (errors.LocalEntryNotFoundError, "cannot be reached"),
    "no configuration": (errors.EntryNotFoundError, r"no config\.json"),
    "a server in trouble": (errors.HfHubHTTPError, "could not be fetched"),
    "a network in trouble": (ConnectionResetError, "could not be fetched"),
    "an id it refuses": (errors.HFValidationError, "could not be fetched"),
}


@pytest.mark.parametrize(("error", "said"), REFUSALS.values(), ids=REFUSALS)
def test_every_refusal_is_one_line_and_exit_2(
    error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    with pytest.raises(InputError, match=said):
        load(ORG)
    assert cli("profile", ORG, "--gpu", "l4").code == 2


def test_without_the_package_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileFormatError, match=r"pip install 'archcompass\[hub\]'"):
        load(ORG)
