"""How well predictions meet measurements on this machine: calibrate, predict, measure, row by row.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py [--seconds 8] [--rounds 4] [--models A,B] [--table FILE] [--keep-table FILE]
                                                    [--again FILE] [--quick]

Sixteen models of all families, from 20M to 1B parameters: prefill at three lengths, decode at three depths, a training step.
The models are taken in rounds, each after a calibration of its own, since a shared machine changes its pace within minutes.
Prints a row for each and the errors over all, and writes benchmarks/results/accuracy-<machine>.json with versions and the load
of the machine, because a busy machine measures its neighbours too. With one thread the clock is the process's own CPU time.
About twelve minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import names, published
from archcompass.errors import ArchcompassError
from archcompass.profiles.calibrate import calibrate
from archcompass.profiles.efficiency import Efficiency, from_json, to_json
from archcompass.profiles.hardware import Hardware, find
from archcompass.profiles.measure.model import measure
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request
from archcompass.profiles.tables import file_name

RESULTS = Path(__file__).resolve().parent / "results"

LENGTHS = (128, 512, 1024)
TRAINED_TOKENS = 256
TRAINED_PARAMETERS = 150_000_000

PUBLISHED = (
    "mamba-130m", "mamba2-130m", "rwkv-4-169m-pile", "rwkv7-0.1b-world", "mamba2-370m", "rwkv7-0.4b-world", "qwen3-0.6b",
)  # fmt: skip


def attention(heads: int, key_heads: int) -> dict[str, Any]:
    return {"kind": "attention", "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 64}


def mlp(size: int) -> dict[str, Any]:
    return {"kind": "gated_mlp", "intermediate_size": size}


def moe(experts: int, size: int) -> dict[str, Any]:
    return {"kind": "moe", "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": size}


def mamba2(heads: int) -> dict[str, Any]:
    return {"kind": "mamba2", "num_heads": heads, "head_dim": 64, "state_size": 128}


def delta(heads: int) -> dict[str, Any]:
    return {"kind": "gated_delta_net", "num_key_heads": heads, "num_value_heads": 2 * heads} | {
        "key_head_dim": 64, "value_head_dim": 64,
    }  # fmt: skip


OWN: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "transformer-20m": (384, 8000, "8*(attention mlp)", {"attention": attention(6, 6), "mlp": mlp(1024)}),
    "transformer-110m": (768, 32000, "12*(attention mlp)", {"attention": attention(12, 12), "mlp": mlp(2048)}),
    "transformer-gqa-250m": (1024, 32000, "16*(attention mlp)", {"attention": attention(16, 4), "mlp": mlp(2816)}),
    "transformer-1b": (2048, 32000, "16*(attention mlp)", {"attention": attention(32, 8), "mlp": mlp(6144)}),
    "moe-210m": (768, 32000, "8*(attention moe)", {"attention": attention(12, 4), "moe": moe(16, 512)}),
    "moe-650m": (1024, 32000, "12*(attention moe)", {"attention": attention(16, 4), "moe": moe(32, 512)}),
    "hybrid-mamba2-180m": (
        768, 32000, "4*(mamba mlp | mamba mlp | mamba mlp | attention mlp)",
        {"mamba": mamba2(24), "attention": attention(12, 4), "mlp": mlp(2048)},
    ),
    "hybrid-moe-300m": (
        768, 32000, "3*(mamba mlp | mamba moe | mamba mlp | attention moe)",
        {"mamba": mamba2(24), "attention": attention(12, 4), "mlp": mlp(2048), "moe": moe(16, 512)},
    ),
    "hybrid-delta-130m": (
        768, 32000, "3*(delta mlp | delta mlp | delta mlp | attention mlp)",
        {"delta": delta(6), "attention": attention(12, 4), "mlp": mlp(2048)},
    ),
}  # fmt: skip


def models(quick: bool) -> list[ModelSpec]:
    """What is measured: our own shapes, and published ones that the zoo has."""
    own = [
        ModelSpec.model_validate({"name": name, "hidden_size": w, "vocab_size": v, "layers": layers, "blocks": blocks})
        for name, (w, v, layers, blocks) in OWN.items()
    ]
    known = [published(name) for name in PUBLISHED if name in names()]
    return own[:1] + own[6:7] if quick else own + known


def rows_of(spec: ModelSpec, table: Efficiency, here: Hardware, seconds: float, quick: bool) -> list[dict[str, Any]]:
    """Measured and predicted times of one model."""
    rows: list[dict[str, Any]] = []
    for length in LENGTHS[:1] if quick else LENGTHS:
        found = compared(spec, Request(prompt=length, generate=24), table, here, seconds)
        rows += [row for row in found if row["tokens"] not in {old["tokens"] for old in rows}]
    if spec.parameters().total <= TRAINED_PARAMETERS:
        trained = Request(prompt=TRAINED_TOKENS, generate=0, mode="training")
        rows += compared(spec, trained, table, here, seconds)
    return rows


def compared(
    spec: ModelSpec, request: Request, table: Efficiency, here: Hardware, seconds: float
) -> list[dict[str, Any]]:
    """One question, measured and predicted for what was really run."""
    seen = measure(spec, request, here, seconds=seconds)
    made = predict(spec, seen.request, here, efficiency=table)
    phases = [("training" if request.training else "prefill", seen.prefill, made.prefill_ms)]
    phases += [("decode", seen.decode, made.decode_ms_per_token)]
    return [
        {
            "model": spec.name, "parameters": spec.parameters().total, "phase": phase, "tokens": seen.request.prompt,
            "generate": seen.request.generate, "precision": request.precision, "source": seen.source,
            "measured_ms": round(times.ms, 3), "low_ms": round(times.low, 3), "high_ms": round(times.high, 3),
            "runs": len(times.runs), "outliers": times.outliers, "predicted_ms": round(foreseen, 3),
            "ratio": round(foreseen / times.ms, 4),
            "activation_bytes": seen.activation_bytes,
            "predicted_activation_bytes": round(made.memory.activation_bytes),
            "state_bytes": seen.state_bytes, "load": round(os.getloadavg()[0], 2),
        }
        for phase, times, foreseen in phases
        if times is not None and foreseen is not None
    ]  # fmt: skip


def judged_again(kept: dict[str, Any], table: Efficiency, here: Hardware) -> list[dict[str, Any]]:
    """Rows of an earlier run, their measurements as they were, their predictions made anew with `table`."""
    specs = {spec.name: spec for spec in models(quick=False)}
    rows = []
    for row in kept["rows"]:
        training = row["phase"] == "training"
        request = Request(
            prompt=row["tokens"], generate=0 if training else row.get("generate", 24),
            mode="training" if training else "inference", precision=row["precision"],
        )  # fmt: skip
        made = predict(specs[row["model"]], request, here, efficiency=table)
        foreseen = made.decode_ms_per_token if row["phase"] == "decode" else made.prefill_ms
        if foreseen is not None:
            rows.append(row | {"predicted_ms": round(foreseen, 3), "ratio": round(foreseen / row["measured_ms"], 4)})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and ninth decile of |ratio - 1|, by phase and over all."""
    found = {}
    for phase in ("prefill", "decode", "training", "all"):
        errors = [abs(row["ratio"] - 1) for row in rows if phase in ("all", row["phase"])]
        if len(errors) > 1:
            p90 = quantiles(errors, n=10)[-1]
            found[phase] = {"rows": len(errors), "median_error": round(median(errors), 4), "p90_error": round(p90, 4)}
    return found


def calibrated(arguments: argparse.Namespace) -> Efficiency:
    """The table given on the command line, or one measured now."""
    if arguments.table:
        return from_json(json.loads(arguments.table.read_text()), where=arguments.table.name)
    table, _ = calibrate(
        "cpu",
        progress=lambda share, text: print(f"\r{share:4.0%} {text:40s}", end="", file=sys.stderr),
        budget_seconds=900,
        keep=False,
        dtypes=("bf16",),
    )
    if arguments.keep_table:
        arguments.keep_table.write_text(json.dumps(to_json(table)) + "\n", encoding="utf-8")
    return table


def printed(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shown = f"{row['measured_ms']:12.2f} {row['predicted_ms']:12.2f} {row['ratio']:6.2f}"
        print(f"{row['model']:24s} {row['phase']:9s} {row['tokens']:6d} {shown}", flush=True)


def measured(arguments: argparse.Namespace, here: Hardware) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of all models round by round, and why some failed."""
    chosen = [
        spec for spec in models(arguments.quick) if not arguments.models or spec.name in arguments.models.split(",")
    ]
    rounds = 1 if arguments.quick or arguments.table else min(arguments.rounds, len(chosen))
    rows, failed = [], {}
    for number in range(rounds):
        table = calibrated(arguments)
        for spec in chosen[number::rounds]:
            try:
                seen = rows_of(spec, table, here, arguments.seconds, arguments.quick)
            except ArchcompassError as error:
                failed[spec.name] = str(error)
                continue
            printed(seen)
            rows += seen
    return rows, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each question")
    parser.add_argument("--rounds", type=int, default=4, help="calibrations, each with its share of the models")
    parser.add_argument("--models", default="", help="only these, with commas")
    parser.add_argument("--quick", action="store_true", help="two models, one length")
    parser.add_argument("--table", type=Path, help="an efficiency table instead of calibrating now")
    parser.add_argument("--again", type=Path, help="results of an earlier run: keep what was measured, predict anew")
    parser.add_argument("--keep-table", type=Path, help="where to write the last table that was calibrated")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load_before, here = os.getloadavg()[0], find("cpu")
    print(f"{'model':24s} {'phase':9s} {'tokens':>6s} {'measured ms':>12s} {'predicted ms':>12s} {'ratio':>6s}")
    if arguments.again:
        rows, failed = judged_again(json.loads(arguments.again.read_text()), calibrated(arguments), here), {}
        printed(rows)
    else:
        rows, failed = measured(arguments, here)
    errors = summary(rows)
    for phase, found in errors.items():
        print(f"{phase:9s} {found['rows']:4.0f} rows  median {found['median_error']:.1%}  p90 {found['p90_error']:.1%}")
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    kept = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": here.name,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "clock": "process CPU time" if torch.get_num_threads() == 1 else "wall",
        "load_before": round(load_before, 2), "load_after": round(os.getloadavg()[0], 2),
        "summary": errors, "failed": failed, "rows": rows,
    }  # fmt: skip
    target = arguments.out or RESULTS / f"accuracy-{file_name(here)}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
