"""`verify` says yes to published models, and no to each kind of lie."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from archcompass.blocks import zoo
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import Parameters, Step
from archcompass.blocks.gated_mlp.module import GatedMLPModule
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.measure import verification
from archcompass.profiles.verify import every_block_once, verify

HYBRID = ModelSpec(
    hidden_size=32,
    vocab_size=64,
    blocks={
        "mamba": Mamba2(num_heads=4, head_dim=16, state_size=16),
        "attention": Attention(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        "mlp": GatedMLP(intermediate_size=48),
    },
    layers="3*(mamba mlp) | attention mlp",
)
CHECKS = ["round trip", "parameters", "FLOPs", "state", "decode equals forward"]

BY_SIZE = sorted(zoo.names(), key=lambda name: zoo.published(name).parameters().total, reverse=True)

FAMILIES = {str(zoo.published(name).model_type): name for name in BY_SIZE}
"""The smallest published model of every family."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "MAX_PARAMETERS", 2_000_000)
    monkeypatch.setattr(verification, "PROMPT", 20)
    monkeypatch.setattr(verification, "STEPS", 2)


@pytest.mark.parametrize("name", sorted(FAMILIES.values()))
def test_a_published_model_of_every_family_passes(name: str) -> None:
    once = every_block_once(zoo.published(name))
    checks = [verification.flops(once), verification.state(once)]
    if (
        verification.narrowed(once).parameters().total < 20_000_000
    ):  # the rest is held to it as tiny models, in tests/hf
        checks.append(verification.steps(once))
    assert all(check.passed for check in checks), checks


def test_a_model_that_is_what_it_says_passes_every_check() -> None:
    told: list[str] = []
    report = verify(HYBRID, progress=lambda share, text: told.append(text))
    assert report.passed, report.checks
    assert [check.name for check in report.checks] == CHECKS
    assert told == [*CHECKS, "done"]
    assert json.loads(json.dumps(report.as_data()))["passed"] is True


def test_a_model_no_family_can_say_still_passes_and_says_so() -> None:
    report = verify(HYBRID.model_copy(update={"logit_soft_cap": 9.0}))
    assert report.passed
    assert "no config.json" in report.checks[0].detail


def failing() -> list[str]:
    fresh = ModelSpec.model_validate(HYBRID.model_dump())  # a model counts itself once
    return [check.name for check in verify(fresh).checks if not check.passed]


def test_parameters_that_are_not_there_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GatedMLP.parameters
    monkeypatch.setattr(GatedMLP, "parameters", lambda self, width: honest(self, width) + Parameters(vector=1))
    assert failing() == ["parameters"]


def test_flops_that_are_not_paid_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GatedMLP.work
    monkeypatch.setattr(GatedMLP, "work", lambda self, width, step: honest(self, width, step)[1:])
    assert failing() == ["FLOPs"]


def test_state_that_is_not_said_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mamba2, "state", lambda self, width, context: [])
    assert failing() == ["state"]


def test_a_step_that_is_not_the_forward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GatedMLPModule.forward

    def forgetful(self: Any, x: torch.Tensor, *rest: Any) -> Any:
        y, state = honest(self, x, *rest)
        return (y * 1.01 if x.shape[1] == 1 else y), state

    monkeypatch.setattr(GatedMLPModule, "forward", forgetful)
    assert failing() == ["decode equals forward"]


def test_every_block_once_keeps_every_block() -> None:
    spec = zoo.published("zamba2-2.7b")
    once = every_block_once(spec)
    assert set(once.blocks) == set(spec.blocks)
    assert once.num_hidden_layers == len(spec.blocks)
    assert once.shared == spec.shared
    assert once.work(Step(new_tokens=4))
