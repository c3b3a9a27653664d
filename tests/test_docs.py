"""What the documentation quotes from the program is what the program says; every link leads somewhere."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target
