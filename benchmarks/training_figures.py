"""Fits training on data-centre cards (profiles/data/training.json) to public figures of fully sharded runs, and judges the fit.

    python benchmarks/training_figures.py measured.json [--write]

Reads rows of quality "ok" in tokens a second per card, trained in bfloat16, for models whose shape we know: MPT under
llm-foundry, Llama under fms-fsdp and torchtitan. Three factors on the time of a data sheet are fitted to llm-foundry:
products, attention, elementwise work. No device of the validation part trains in bfloat16, so each fitted card is judged by
a fit to the other one, and the fit by the two kinds of software it has never seen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

from engines import kinds_of, spec_of, spread  # noqa: E402

from archcompass.blocks.model.spec import ModelSpec  # noqa: E402
from archcompass.errors import ArchcompassError  # noqa: E402
from archcompass.profiles.efficiency import ACCELERATOR  # noqa: E402
from archcompass.profiles.hardware import Hardware, find  # noqa: E402
from archcompass.profiles.predict import Prediction, predict  # noqa: E402
from archcompass.profiles.request import Recompute, Request  # noqa: E402

TARGET = HERE.parent / "profiles" / "data" / "training.json"
FITTED = "llm-foundry"
KINDS = ("gemm", "attention", "pointwise")
GRIDS = (
    [1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0],
    [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0],
    [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
)

# (width, layers, heads) of MPT, from llm-foundry's configurations; inner width four times the width, no gate.
MPT = {
    "MPT-125M": (768, 12, 12), "MPT-350M": (1024, 24, 16), "MPT-760M": (1536, 24, 12), "MPT-1B": (2048, 24, 16),
    "MPT-3B": (2560, 32, 20), "MPT-7B": (4096, 32, 32), "MPT-13B": (5120, 40, 40), "MPT-30B": (7168, 48, 56),
    "MPT-70B": (8192, 80, 64),
}  # fmt: skip


class Row(NamedTuple):
    """One published run: ms of one micro-batch on all cards, and how many of them share one update."""

    software: str
    card: Hardware
    spec: ModelSpec
    request: Request
    accumulated: int
    ms: float
    source: str


def mpt(name: str) -> ModelSpec | None:
    """An MPT, without its table of positions, which is looked up and not multiplied."""
    if name not in MPT:
        return None
    width, layers, heads = MPT[name]
    attention = {"kind": "attention", "num_attention_heads": heads, "num_key_value_heads": heads}
    attention |= {"head_dim": width // heads, "rope": None}
    mlp = {"kind": "gated_mlp", "intermediate_size": 4 * width, "gated": False, "hidden_act": "gelu"}
    return ModelSpec.model_validate(
        {"name": name.lower(), "hidden_size": width, "vocab_size": 50368, "tie_word_embeddings": True,
         "layers": f"{layers}*(attention mlp)", "blocks": {"attention": attention, "mlp": mlp}}
    )  # fmt: skip


def recompute_of(note: str) -> Recompute:
    """What a row says it computes again."""
    if "checkpointing=True" in note:
        return "full"
    return "selective" if "SAC" in note else "none"


def row_of(raw: dict[str, Any]) -> Row | None:
    """The question behind a public figure, or None when we cannot ask it."""
    spec, batch, count = mpt(raw["model"]) or spec_of(raw["model"]), raw["batch"], raw["n_gpu"]
    if spec is None or not isinstance(batch, int) or raw["dtype"] not in ("bf16", "amp_bf16") or not raw["hw_id"]:
        return None
    try:
        card = find(f"{count}x {raw['hw_id']}" if count > 1 else raw["hw_id"])
    except ArchcompassError:
        return None
    tokens, note = batch * raw["input_len"], raw["note"]
    request = Request(
        batch=batch * count, prompt=raw["input_len"], generate=0, mode="training", parallel="data",
        recompute=recompute_of(note),
    )  # fmt: skip
    together = re.search(r"global batch (\d+)", note)
    accumulated = max(1, round(int(together[1]) / (count * batch))) if together else 1
    software = raw["framework"].split("/")[0].split(" ")[0].split("+")[0]
    return Row(software, card, spec, request, accumulated, 1e3 * tokens / raw["value"], raw["source"])


def parts_of(row: Row) -> dict[str, float] | None:
    """ms by kind on the data sheet, forward and backward, of one micro-batch; None where our ledger says it does not fit."""
    made: Prediction = predict(row.spec, row.request, row.card, efficiency=ACCELERATOR)
    if made.prefill is None:
        return None
    again = {"none": 1.0, "selective": 1.1, "full": 4 / 3}[row.request.recompute]
    found = dict.fromkeys((*KINDS, "rest"), 0.0)
    for part in made.prefill.parts:
        if part.name == "optimizer":
            found["rest"] += part.ms / row.accumulated
        elif part.name != "recomputed activations":
            found[part.kind if part.kind in KINDS else "rest"] += part.ms * again
    return found


Known = list[tuple[Row, dict[str, float]]]


def ratios(rows: Known, factors: dict[str, float]) -> list[float]:
    """Predicted over published time."""
    return [sum(ms * factors.get(kind, 1.0) for kind, ms in parts.items()) / row.ms for row, parts in rows]


def error(rows: Known, factors: dict[str, float]) -> float | None:
    return round(median(abs(value - 1) for value in ratios(rows, factors)), 4) if rows else None


def best_fit(rows: Known) -> dict[str, float]:
    """The factors with the least mean error of the logarithm."""

    def loss(factors: dict[str, float]) -> float:
        return sum(min(abs(math.log(value)), 1.0) for value in ratios(rows, factors))

    return min((dict(zip(KINDS, trial, strict=True)) for trial in product(*GRIDS)), key=loss)


def by(rows: Known, factors: dict[str, float], name: Any) -> dict[str, dict[str, Any]]:
    """Errors of the rows in groups."""
    groups: dict[str, Known] = {}
    for known in rows:
        groups.setdefault(str(name(known[0])), []).append(known)
    return {
        group: {
            "rows": len(mine),
            "median_error": error(mine, factors),
            "median_ratio": round(median(ratios(mine, factors)), 3),
        }
        for group, mine in sorted(groups.items())
    }


def judged(rows: Known, factors: dict[str, float]) -> dict[str, Any]:
    """Errors on what was fitted, of each card by the other, and on other software and cards."""
    fitted = [known for known in rows if known[0].software == FITTED]
    cards = sorted({row.card.id for row, _ in fitted})
    unseen = [known for known in rows if known[0].software != FITTED]
    left_out = {}
    for card in cards:
        others, mine = ([k for k in fitted if (k[0].card.id == card) is same] for same in (False, True))
        left_out[card] = {"rows": len(mine), "median_error": error(mine, best_fit(others))}
    return {
        "fitted": {"rows": len(fitted), "median_error": error(fitted, factors)},
        "cards": by(fitted, factors, lambda row: row.card.id),
        "models": by(fitted, factors, lambda row: row.spec.name),
        "lengths": by(fitted, factors, lambda row: row.request.prompt),
        "each card by the other": left_out,
        "software never seen": by(unseen, factors, lambda row: f"{row.software} on {row.card.id}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the fit in profiles/data/training.json")
    arguments = parser.parse_args()
    raw = [
        r for r in json.loads(arguments.data.read_text())["rows"] if r["quality"] == "ok" and r["task"] == "training"
    ]
    asked = [row for r in raw if r["metric"] == "train_tok_s_per_gpu" and (row := row_of(r)) is not None]
    rows = [(row, parts) for row in asked if (parts := parts_of(row)) is not None]
    fitted = [known for known in rows if known[0].software == FITTED]
    factors = best_fit(fitted)
    found = judged(rows, factors)
    print(json.dumps({"rows": len(rows), "do not fit": len(asked) - len(rows), "factors": factors} | found, indent=1))
    if arguments.write:
        kept = {
            "what": "Training on data-centre cards, fitted to public figures (benchmarks/training_figures.py): factors on time",
            "fits": {"NVIDIA": {"datacenter": {
                "factors": factors, "spread": spread(ratios(fitted, factors)),
                "made": {
                    "date": datetime.date.today().isoformat()[:7], "judged": found,
                    "kinds": kinds_of([row for row, _ in fitted]), "devices": sorted({row.card.id for row, _ in fitted}),
                    "architectures": sorted({row.card.architecture for row, _ in fitted}),
                    "sources": sorted({row.source.split(":")[0] for row, _ in fitted}),
                },
            }}},
        }  # fmt: skip
        TARGET.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
