"""Whether a model is what it says: its file, its parameters, its FLOPs, its state, and steps against one forward.

Parameters are those of the whole model on `meta`. The rest is asked of a model that holds every block once: FLOPs and state
at full width on `meta`, and real numbers at a width that fits this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from archcompass.blocks.hf import read_config, to_config
from archcompass.blocks.hf.compare import differences
from archcompass.blocks.model.files import parse, to_yaml
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import ConversionError

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was asked.
        passed: whether both sides agree.
        detail: the numbers compared, and at what size.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Every check of one model.

    Attributes:
        model: its name.
        checks: in the order they ran.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all agree."""
        return all(check.passed for check in self.checks)

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"model": self.model, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def _silent(_share: float, _text: str) -> None:
    """Progress that nobody watches."""


def verify(spec: ModelSpec, *, progress: Progress = _silent) -> VerifyReport:
    """Runs every check on this machine's CPU. Imports torch.

    Args:
        spec: the model.
        progress: told the share done (0..1) and what runs.
    """
    from archcompass.profiles.measure import verification

    once = every_block_once(spec)
    stages: list[tuple[str, Callable[[], Check]]] = [
        ("round trip", lambda: round_trip(spec)),
        ("parameters", lambda: verification.parameters(spec)),
        ("FLOPs", lambda: verification.flops(once)),
        ("state", lambda: verification.state(once)),
        ("decode equals forward", lambda: verification.steps(once)),
    ]
    checks = []
    for number, (name, run) in enumerate(stages):
        progress(number / len(stages), name)
        checks.append(run())
    progress(1.0, "done")
    return VerifyReport(spec.name, tuple(checks))


def every_block_once(spec: ModelSpec) -> ModelSpec:
    """The model with every named block in a layer of its own, in the order they first stand."""
    order = dict.fromkeys(name for layer in spec.expanded for name in layer)
    return spec.with_layers(" | ".join(order))


def round_trip(spec: ModelSpec) -> Check:
    """The YAML file says the same model again, and so does a config.json where a family can say it."""
    again = parse(yaml.safe_load(to_yaml(spec)))
    if again != spec:
        lost = differences(spec, again) or ["names or pattern"]
        return Check("round trip", False, f"the YAML file loses {lost[0]}")
    try:
        config = to_config(spec)
    except ConversionError as error:
        return Check("round trip", True, f"YAML; no config.json: {error}")
    lost = differences(spec, read_config(config))
    return Check("round trip", not lost, f"config.json loses {lost[0]}" if lost else f"YAML and {config['model_type']}")
