"""The wheel is whole, owns one top-level name, and runs in an environment that has never seen the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, cwd=out)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file_once_and_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "archcompass",
        f"archcompass-{wheel.name.split('-')[1]}.dist-info",
    }
    ours = [path for floor in ("kernels", "blocks", "profiles", "advisor") for path in (ROOT / floor).rglob("*.py")]
    missing = {f"archcompass/{path.relative_to(ROOT)}" for path in ours} - set(names)
    assert not missing
    assert "archcompass/profiles/data/gpus.json" in names
    assert "archcompass/kernels/__init__.py" not in names


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """Without a choice `build` makes the sdist, and the wheel from it. In full, with dependencies: make release-check."""
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    ours, theirs = (
        {name: archive.read(name) for name in archive.namelist()}
        for archive in map(zipfile.ZipFile, (wheel, next(tmp_path.glob("*.whl"))))
    )
    assert [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] == []


def test_the_wheel_recommends_where_nothing_else_of_ours_is(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    # The dependencies of this environment, but not its link to the checkout: a plain path line is not a site folder.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [environment / "bin" / "archcompass", "recommend", "--context", "8k", "--gpu", "rtx-4090", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert json.loads(done.stdout)["family"] in ("transformer", "moe", "ssm", "hybrid")
    where = subprocess.run(
        [python, "-c", "import archcompass; print(archcompass.__file__)"],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=clean,
    )  # fmt: skip
    assert str(environment) in where.stdout
