"""Predictions over a grid of models and cards are what they were; and every formula that matters is felt when it is damaged."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from archcompass.blocks import base
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.moe import spec as moe
from archcompass.blocks.precision import Precision
from archcompass.kernels.attention import cost
from archcompass.profiles import activations, ledger, predict

ROOT = Path(__file__).resolve().parents[2]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "tools" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


golden = _tool()
KEPT: dict[str, dict[str, float | None]] = json.loads(golden.TARGET.read_text(encoding="utf-8"))


def differences(names: list[str]) -> list[str]:
    """Where an answer is not the kept one, rounding aside."""
    found = []
    for name in names:
        model, card, question = name.split(" | ")
        now = golden.answer(model, card, golden.QUESTIONS[question])
        for key, value in KEPT[name].items():
            if now[key] is None or value is None:
                found += [f"{name}: {key}"] * (now[key] is not value)
            elif abs(now[key] - value) > 2e-5 * abs(value):
                found.append(f"{name}: {key} was {value:.5g} and is {now[key]:.5g}")
    return found


def test_predictions_are_the_golden_ones() -> None:
    """Meant to change? `python tools/golden.py`, and look at the diff."""
    assert set(KEPT) == {f"{m} | {c} | {q}" for m in golden.MODELS for c in golden.CARDS for q in golden.QUESTIONS}
    assert differences(list(KEPT)) == []


def doubled(original: Callable[..., Any], *args: Any, **more: Any) -> Any:
    return 2 * original(*args, **more)


def whole_square(new: int, keys: int, *_: Any, **__: Any) -> int:
    return new * keys


def every_expert(experts: int, *_: Any) -> float:
    return float(experts)


def no_window(self: Attention, context: int) -> int:
    return context


def no_scales(self: Precision, elements: float) -> float:
    return elements * int(self.bits) / 8


def half_the_heads(tensor: Any, cards: int) -> int:
    return cards


def no_backward(step: Any, *args: Any, **more: Any) -> Any:
    return ORIGINAL_GEMM(replace(step, training=False), *args, **more)


def nothing_saved(*args: Any) -> Any:
    return base.Live()


ORIGINAL_GEMM = base.gemm
CHAT, LONG, TRAINING = (
    "llama-3.1-8b | h200 | chat",
    "llama-3.1-8b | 8x h200 | long",
    "llama-3.1-8b | 8x h200 | training",
)
DAMAGE = {
    "the cache's bytes": (base.StateTensor, "bytes", partial(doubled, base.StateTensor.bytes), CHAT),
    "causal halving": (cost, "visible_pairs", whole_square, CHAT),
    "expected experts": (moe, "expected_distinct_experts", every_expert, "mixtral-8x7b | h200 | chat"),
    "the window's cap": (Attention, "_visible", no_window, "gemma-3-12b-text | h200 | chat"),
    "scales of a quantised weight": (Precision, "bytes", no_scales, LONG),
    "heads that cannot be split": (ledger, "shards", half_the_heads, "deepseek-v3.1 | 8x h200 | long"),
    "what stays in 16 bits": (ledger, "plain_matrices", lambda *_: 0, "gpt-oss-20b | h200 | mxfp4"),
    "activations": (activations, "sublayer_live", nothing_saved, TRAINING),
    "messages between cards": (predict, "_messages", lambda *_: [], LONG),
    "the optimizer's pass": (predict, "_with_update", lambda step, *_: step, TRAINING),
}


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_damage_is_felt(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, damaged, question = DAMAGE[what]
    assert differences([question]) == []
    if isinstance(damaged, partial):
        monkeypatch.setattr(owner, name, lambda *args, damaged=damaged: damaged(*args))
    else:
        monkeypatch.setattr(owner, name, damaged)
    assert differences([question])


def test_a_training_step_pays_for_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from archcompass.blocks.attention import spec as attention

    monkeypatch.setattr(attention, "gemm", no_backward)
    assert differences([TRAINING])
