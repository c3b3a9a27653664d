"""The whole way: recommend, build the pick from real blocks on this machine, profile it, and hand it over.

The folder it writes holds workload.yaml (the question), model.yaml (the answer, ready for other tools), report.json (every
number) and report.html (the picture). All four are written, whole, or none.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from archcompass.advisor.pictures import gather
from archcompass.advisor.reading import Reading
from archcompass.advisor.recommend import Recommendation, recommend
from archcompass.advisor.result import Result
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.workload import Workload
from archcompass.blocks.model.files import make_folder, to_yaml, write_texts
from archcompass.errors import DoesNotFitError
from archcompass.profiles.profile import ProfileReport, profile

Progress = Callable[[float, str], None]

MODEL = "model.yaml"


@dataclass(frozen=True, kw_only=True)
class Advice(Result):
    """The answer and what its pick does: predicted for the card asked for, measured where we run.

    Attributes:
        recommendation: family, reasons, candidates.
        profile: the first candidate's, predicted for the target and measured here.
        pictures: what the report draws beyond them (see pictures.py).
        versions: of what made these numbers.
    """

    workload: Workload
    recommendation: Recommendation
    profile: ProfileReport
    pictures: dict[str, Any]
    versions: dict[str, str]

    def as_data(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "archcompass": 1,
            "recommendation": self.recommendation.model_dump(mode="json"),
            "profile": self.profile.model_dump(mode="json"),
            "pictures": self.pictures,
            "versions": self.versions,
        }


def advise(
    workload: Workload,
    *,
    seconds: float = 40.0,
    progress: Progress | None = None,
    effort: Literal["normal", "high"] = "normal",
    folder: Path | None = None,
) -> Advice:
    """Recommends, builds and profiles.

    Args:
        seconds: about how long measuring may take.
        progress: told (share done, what is done now).
        effort: "high" adds what could be had instead.
        folder: where it will be written: what checks the profile reads the model from there.

    Raises:
        DoesNotFitError: no family fits; says what would.
        MeasurementError: a block cannot run on this machine.
    """
    answer = recommend(workload, effort=effort)
    pick = answer.candidates[0]
    if pick.model is None or not pick.fits:
        raise DoesNotFitError(answer.refusal or "no family fits this card")
    reading = Reading.of(workload)
    asked = Ask(reading).request(pick.precision)
    report = profile(
        pick.model,
        gpu=reading.hardware,
        device=here(),
        batch=asked.batch,
        prompt=asked.prompt,
        generate=asked.generate,
        precision=asked.precision,
        mode=asked.mode,
        **pick.runs,
        seconds=seconds,
        progress=progress,
        called=str((folder or Path()) / MODEL),
    )
    return Advice(
        workload=workload,
        recommendation=answer,
        profile=report,
        pictures=gather(workload, answer),
        versions=_versions(),
    )


def here() -> str:
    """The fastest device of this machine that blocks run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def write(advice: Advice, folder: Path) -> list[Path]:
    """Writes the folder's files and returns their paths.

    Raises:
        FileFormatError: the folder cannot be made or written to.
    """
    from archcompass.advisor.report.html import page

    data = advice.as_data()
    contents = {
        "workload.yaml": advice.workload.to_yaml(),
        MODEL: to_yaml(advice.recommendation.candidates[0].model),
        "report.json": json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": page(data, f"archcompass advise {folder / 'workload.yaml'} -o {folder}", str(folder)),
    }
    return write_all(folder, contents)


def write_all(folder: Path, contents: dict[str, str]) -> list[Path]:
    """Writes named texts into a folder, made if need be: all or none."""
    make_folder(folder)
    return write_texts(folder, contents)


def _versions() -> dict[str, str]:
    packages = ("archcompass", "torch", "pydantic")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
