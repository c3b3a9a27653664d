"""What the documentation quotes from the program is what the program says; every link leads somewhere."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import archcompass
from archcompass.blocks.hf.configuration import read_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def quotes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quotes", ROOT / "tools" / "quotes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_quoted_output_is_what_the_program_prints(page: Path, quotes: ModuleType) -> None:
    text = page.read_text()
    assert quotes.refreshed(text) == text, "run tools/quotes.py"


def test_the_readmes_python_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["answer"].family == "hybrid"
    assert sum(p.numel() for p in names["model"].parameters()) == names["spec"].parameters().total
    assert names["profile"].fits


def test_the_python_that_loads_weights_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    spec = read_config({"model_type": "llama", "vocab_size": 60, **tiny})
    archcompass.save_pretrained(spec.build(), tmp_path / "hf-folder")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "models.md", "exec"), names)
    again = archcompass.load_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(names["prompt"], 8), names["tokens"])
    assert names["out"].state.past == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target
