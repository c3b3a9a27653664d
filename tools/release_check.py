"""Checks what would be released: builds sdist and wheel, installs them into an empty environment, and asks each for an answer.

The wheel's dependencies are resolved as a user's would be, under constraints.txt so that a CPU machine is not sent gigabytes of
CUDA; the sdist then takes the wheel's place. The wheel built from the sdist must hold the same files as the checkout's.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

QUESTION = ("recommend", "--context", "128k", "--recall", "high", "--gpu", "rtx-4090", "--json")


def main() -> int:
    """Builds, compares, installs, asks; raises at the first thing that fails."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        wheel, sdist = _built(place)
        _same(wheel, _from_sdist(sdist, place))
        environment = place / "env"
        venv.create(environment, with_pip=True)
        families = {
            _answer(environment, "--constraint", ROOT / "constraints.txt", wheel),
            _answer(environment, "--no-deps", "--force-reinstall", sdist),
        }
        if len(families) != 1:
            raise SystemExit(f"wheel and sdist answer differently: {families}")
    sys.stdout.write(f"{wheel.name} and {sdist.name} install and answer {families.pop()}\n")
    return 0


def _built(place: Path) -> tuple[Path, Path]:
    """Wheel and sdist of the checkout."""
    for kind in ("--wheel", "--sdist"):
        _run(sys.executable, "-P", "-m", "build", kind, "--no-isolation", "--outdir", place / "dist", ROOT, cwd=place)
    return next((place / "dist").glob("*.whl")), next((place / "dist").glob("*.tar.gz"))


def _from_sdist(sdist: Path, place: Path) -> Path:
    """The wheel that pip would build from the sdist."""
    out = place / "from-sdist"
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, sdist, cwd=place)
    return next(out.glob("*.whl"))


def _same(one: Path, other: Path) -> None:
    """Raises when two wheels hold different files."""
    first, second = _contents(one), _contents(other)
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if differing:
        raise SystemExit(f"the sdist makes another wheel: {', '.join(differing[:10])}")


def _contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def _answer(environment: Path, *package: object) -> str:
    """The family that an environment recommends once `package` is installed there."""
    python = environment / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", *package, cwd=environment)
    said = _run(environment / "bin" / "archcompass", *QUESTION, cwd=environment)
    where = _run(python, "-c", "import archcompass; print(archcompass.__file__)", cwd=environment)
    if str(environment) not in where:
        raise SystemExit(f"not the installed package, but {where.strip()}")
    family: str = json.loads(said)["family"]
    return family


def _run(*command: object, cwd: Path) -> str:
    """What a command prints, run where no checkout lies and no variable points to one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:6]))} ...: {done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
