"""Golden predictions: a grid of models and cards, kept as text so that a change of any formula is reviewed as a diff.

    python tools/golden.py            writes tests/data/golden_predictions.json anew

`tests/profiles/test_golden.py` compares within rounding. The grid speaks of data sheets and ordinary efficiencies, so that
no calibration moves it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from archcompass.blocks.zoo import published
from archcompass.profiles.efficiency import ACCELERATOR
from archcompass.profiles.hardware import find
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request

TARGET = Path(__file__).resolve().parent.parent / "tests" / "data" / "golden_predictions.json"

MODELS = (
    "llama-3.1-8b", "gemma-3-12b-text", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3.1", "mamba2-2.7b", "mamba-2.8b",
    "rwkv7-0.4b-world", "jamba-v0.1", "qwen3-next-80b-a3b", "kimi-linear-48b-a3b", "falcon-h1-7b",
)  # fmt: skip
CARDS = ("rtx-4090", "h200", "8x h200")
QUESTIONS: dict[str, dict[str, Any]] = {
    "chat": {"prompt": 2048, "generate": 256},
    "long": {"prompt": 131072, "generate": 64, "batch": 4, "precision": "int4", "kv_precision": "fp8"},
    "mxfp4": {"prompt": 512, "generate": 512, "batch": 32, "precision": "mxfp4"},
    "training": {"prompt": 4096, "generate": 0, "mode": "training", "batch": 8, "recompute": "full"},
}


def grid() -> dict[str, dict[str, float | None]]:
    """Every answer by "model | card | question", to five digits; None for speeds of what does not fit."""
    return {
        f"{model} | {card} | {name}": answer(model, card, asked)
        for model in MODELS
        for card in CARDS
        for name, asked in QUESTIONS.items()
    }


def answer(model: str, card: str, asked: dict[str, Any]) -> dict[str, float | None]:
    """Memory and speed of one question."""
    made = predict(published(model), Request(**asked), find(card), efficiency=ACCELERATOR)
    memory = made.memory
    found = {
        "weights_bytes": memory.weights_bytes,
        "state_bytes": memory.state_bytes,
        "activation_bytes": memory.activation_bytes,
        "training_bytes": memory.training_bytes,
        "per_card_bytes": memory.per_card_bytes,
        "flops": made.prefill_flops,
        "prefill_ms": made.prefill_ms,
        "decode_ms": made.decode_ms_per_token,
    }
    return {key: None if value is None else float(f"{value:.5g}") for key, value in found.items()}


def main() -> None:
    lines = [f" {json.dumps(key)}: {json.dumps(found)}" for key, found in grid().items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
