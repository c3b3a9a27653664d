"""A block from another package appears everywhere; the tutorial that makes one is true."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "adding-a-block.md"
FILE = re.compile(r"<!-- file: (?P<path>\S+) -->\n```\w+\n(?P<text>.*?)^```$", re.S | re.M)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's files, and the metadata an installer would make of its pyproject.toml."""
    folder = tmp_path_factory.mktemp("acme")
    for found in FILE.finditer(TUTORIAL.read_text()):
        path = folder / found["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found["text"])
    package = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    information = folder / "acme_blocks-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package['name']}\nVersion: {package['version']}\n"
    )
    points = package["entry-points"]["archcompass.blocks"]
    lines = ["[archcompass.blocks]", *(f"{name} = {place}" for name, place in points.items())]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(project), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment, timeout=120)


def test_the_block_is_known_by_name(project: Path) -> None:
    done = run(project, "-c", "from archcompass.blocks.base import known_blocks; print(*known_blocks())")
    assert "token_shift" in done.stdout.split(), done.stderr


def test_the_command_line_predicts_a_model_made_of_it(project: Path) -> None:
    done = run(project, "-m", "archcompass", "profile", "model.yaml", "--gpu", "RTX 4090", "--json")
    report = json.loads(done.stdout)
    assert report["parameters"]["total"] == 2 * 256 * 64 + 64 + 4 * (64 * 64 + 64 + 3 * 64 * 192 + 2 * 64)
    assert report["profiles"][0]["decode"]["ms_per_token"] > 0


def test_verify_holds_it_to_its_word(project: Path) -> None:
    done = run(project, "-m", "archcompass", "verify", "model.yaml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kind_defined_twice_is_refused_by_name(project: Path) -> None:
    code = (
        "from typing import Literal\nfrom archcompass.blocks.base import Block\nimport archcompass.blocks.gated_mlp.spec\n"
        "class Twin(Block):\n    kind: Literal['gated_mlp'] = 'gated_mlp'\n"
    )
    done = run(project, "-c", code)
    assert done.returncode == 1
    assert "'gated_mlp' is defined twice" in done.stderr
