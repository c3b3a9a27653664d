"""The house stands: imports point down, specs know no torch, nothing shadows another package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "blocks", "profiles", "advisor")
FILES = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file, but for what only a type checker sees."""
    names: set[str] = set()
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from run_time_nodes(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = {f"archcompass.{name}" for name in FLOORS[floor + 1 :]}
    upward = {name for name in imports_of(path) if ".".join(name.split(".")[:2]) in above}
    assert not upward


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "spec.py"], ids=lambda path: path.parent.name)
def test_a_spec_knows_no_torch(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] in {"torch", "triton", "numpy"}}


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"


def test_the_root_is_not_importable_by_accident() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
