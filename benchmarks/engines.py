"""Fits the engine tables (profiles/data/engines.json) to public figures, and judges them on devices left out of the fit.

    python benchmarks/engines.py measured.json [--write] [--leave-one-out]

Reads rows of quality "ok" for models whose shape we know. Rows of split "calibration" are fitted, five numbers per engine and
vendor; rows of split "validation" are devices the fit has never seen. Writes the fit and its errors; prints a table. With
--leave-one-out every fitted device in turn is left out of the fit and judged by what the others teach.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import names, published
from archcompass.errors import ArchcompassError
from archcompass.profiles.efficiency import ACCELERATOR, Efficiency, adapted
from archcompass.profiles.hardware import FP16_SUMS, Hardware, find
from archcompass.profiles.predict import PIPELINE_TOKENS, pipelined, predict
from archcompass.profiles.request import Request, usual_parallel

TARGET = Path(__file__).resolve().parent.parent / "profiles" / "data" / "engines.json"

LEFT_OUT = Path(__file__).resolve().parent / "results" / "engines_left_out.json"

ALIASES = {
    "llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b", "llama-3.3-70b": "llama-3.1-70b",
    "mistral-7b": "mistral-7b-v0.3", "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
}  # fmt: skip

# (width, layers, heads, key heads, inner, vocabulary, tied) of dense models that the zoo does not carry, from their cards.
DENSE = {
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000, False),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000, False),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-3b": (2048, 36, 16, 2, 11008, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-coder-7b": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-14b": (5120, 48, 40, 8, 13824, 152064, False),
    "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, False),
    "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, False),
}

FEWEST_DECODES = 8  # rows of decoding that five numbers are fitted to

PRECISIONS = (
    ("q4_k_m", "q4_k_m"), ("q8_0", "q8_0"), ("q6_k", "q6_k"), ("q5_k_m", "q5_k_m"), ("q4_0", "q4_0"), ("mxfp4", "mxfp4"),
    ("int8", "int8"), ("int4", "int4"), ("awq", "int4"), ("w4a16", "int4"), ("fp8", "fp8"), ("bf16", "bf16"),
    ("fp16", "fp16"), ("f16", "fp16"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One public figure that we can ask ourselves about; `scores_bytes` are moved beside what the blocks state."""

    engine: str
    split: str
    hardware: Hardware
    spec: ModelSpec
    request: Request
    phase: str
    ms: float
    source: str
    scores_bytes: float = 0.0


def spec_of(name: str) -> ModelSpec | None:
    """The model a row speaks of, if its shape is known."""
    key = ALIASES.get(name.lower(), name.lower())
    if key in names():
        return published(key)
    if key not in DENSE:
        return None
    width, layers, heads, key_heads, inner, vocabulary, tied = DENSE[key]
    attention = {"kind": "attention", "num_attention_heads": heads, "num_key_value_heads": key_heads}
    attention |= {"head_dim": width // heads}
    blocks = {"attention": attention, "mlp": {"kind": "gated_mlp", "intermediate_size": inner}}
    return ModelSpec.model_validate(
        {"name": key, "hidden_size": width, "vocab_size": vocabulary, "tie_word_embeddings": tied,
         "layers": f"{layers}*(attention mlp)", "blocks": blocks}
    )  # fmt: skip


def engine_of(framework: str) -> str | None:
    """Our name for the software, where we have one; of transformers the compiled and captured variant."""
    text = framework.lower()
    if text.startswith(("llama.cpp", "llamacpp")) and "vulkan" not in text:
        return "llama.cpp"
    if text.startswith("vllm"):
        return "vllm"
    return "transformers" if "transformers" in text and "compile, cuda graph" in text else None


def precision_of(dtype: str) -> str | None:
    """Our name for a storage format; the dynamic formats (UD-, _XL) have none."""
    text = dtype.lower()
    if "ud-" in text or "_xl" in text or "kv" in text:
        return None
    return next((ours for theirs, ours in PRECISIONS if theirs in text), None)


def row_of(raw: dict[str, Any]) -> Row | None:
    """The question behind a public figure, or None when we cannot ask it."""
    engine = engine_of(raw.get("framework") or "")
    precision = precision_of(raw.get("dtype") or "")
    spec = spec_of(raw["model"])
    batch = raw.get("batch")
    if not engine or not precision or spec is None or not raw.get("hw_id") or not isinstance(batch, int):
        return None
    try:
        card = find(f"{raw['n_gpu']}x {raw['hw_id']}" if raw["n_gpu"] > 1 else raw["hw_id"])
    except ArchcompassError:
        return None
    parallel = usual_parallel("inference", engine)
    context = int(raw.get("context") or raw.get("input_len") or 0)
    common = {"batch": batch, "precision": precision, "engine": engine, "parallel": parallel}
    value = raw["value"]
    if raw["metric"] == "decode_tok_s":
        request = Request(prompt=max(context, 1), generate=1, **common)
        together = batch if raw["scope"] in ("aggregate", "per_run") else 1
        return Row(engine, raw["split"], card, spec, request, "decode", 1e3 * together / value, raw["source"])
    if raw["metric"] == "prefill_tok_s" and raw.get("input_len"):
        request = Request(prompt=int(raw["input_len"]), generate=0, **common)
        ms = 1e3 * batch * request.prompt / value
        moved = scores_bytes(spec, request) if "no flash-attn" in raw["framework"] else 0.0
        return Row(engine, raw["split"], card, spec, request, "prefill", ms, raw["source"], moved)
    if raw["metric"] == "ttft_ms" and raw.get("input_len") and engine == "transformers":
        request = Request(prompt=int(raw["input_len"]), generate=0, **common)
        return Row(engine, raw["split"], card, spec, request, "prefill", raw["value"], raw["source"])
    return None


def scores_bytes(spec: ModelSpec, request: Request) -> float:
    """What attention without a flash kernel moves besides: the scores of every micro-batch with all keys so far, written by
    the product, read and written by the softmax, read by the second product, all in float32."""
    attended = sum(min(start + PIPELINE_TOKENS, request.prompt) for start in range(0, request.prompt, PIPELINE_TOKENS))
    heads = sum(op.shape[1] * op.count for op in spec.work(request.step(1)) if op.kind == "attention")
    return 16.0 * request.batch * heads * min(PIPELINE_TOKENS, request.prompt) * attended


def ratio(row: Row, table: Efficiency) -> float | None:
    """Predicted over published time; None where the ledger says it cannot have run."""
    made = predict(row.spec, row.request, row.hardware, efficiency=table)
    ms = made.decode_ms_per_token if row.phase == "decode" else made.prefill_ms
    if ms is None or not row.scores_bytes:
        return None if ms is None else ms / row.ms
    reached = row.hardware.bandwidth_bytes_per_second * table.kinds["pointwise"].memory.at(row.scores_bytes)
    return (ms + 1e3 * row.scores_bytes / reached * pipelined(row.request, row.hardware.count)) / row.ms


def ratios(rows: list[Row], fit: dict[str, Any], phase: str) -> list[float]:
    tables = {
        kind: adapted(ACCELERATOR, fit | fit["by_kind"].get(kind, {}), "trial")
        for kind in {r.hardware.kind for r in rows}
    }
    found = [ratio(row, tables[row.hardware.kind]) for row in rows if row.phase == phase]
    return [value for value in found if value is not None]


def within(rows: list[Row], fit: dict[str, Any], phase: str) -> float | None:
    """Share of published times that lie in the range stated around the predicted one; eight of ten are meant to."""
    found = []
    for kind in sorted({row.hardware.kind for row in rows}):
        low, high = (fit | fit["by_kind"].get(kind, {}))["spread"][phase]
        values = ratios([row for row in rows if row.hardware.kind == kind], fit, phase)
        found += [low <= 1 / value <= high for value in values]
    return round(sum(found) / len(found), 3) if found else None


def error(values: list[float]) -> float:
    """Median relative error."""
    return median(abs(value - 1) for value in values) if values else math.inf


def best_fit(rows: list[Row]) -> dict[str, Any]:
    """The five numbers with the least median error of the logarithm: decode first, prefill with what that left."""
    fit: dict[str, Any] = {
        "read": 1.0, "products": 1.0, "experts": 1.0, "layer_seconds": 60e-6, "step_seconds": 126e-6,
        "spread": {"prefill": [0.5, 2.0], "decode": [0.5, 2.0]}, "made": {}, "by_kind": {},
        "computes": FP16_SUMS if rows[0].engine == "llama.cpp" else "",
    }  # fmt: skip
    grids = {
        "decode": (("read", (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)),
                   ("layer_seconds", (0.0, 10e-6, 20e-6, 40e-6, 60e-6, 80e-6, 100e-6, 140e-6, 200e-6, 300e-6, 500e-6, 800e-6))),
        "prefill": (("products", (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)),
                    ("experts", (0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0))),
    }  # fmt: skip
    if "grouped_gemm" not in kinds_of(rows):
        grids["prefill"] = (grids["prefill"][0], ("experts", (fit["experts"],)))
    for phase, axes in grids.items():
        if any(row.phase == phase for row in rows):
            fit |= least(rows, fit, phase, axes)
            fit["spread"][phase] = spread(ratios(rows, fit, phase))
    for kind in sorted({row.hardware.kind for row in rows}):
        mine = [row for row in rows if row.hardware.kind == kind]
        if sum(row.phase == "prefill" for row in mine) >= 8:
            experts = grids["prefill"][1] if "grouped_gemm" in kinds_of(mine) else ("experts", (fit["experts"],))
            own = least(mine, fit, "prefill", (grids["prefill"][0], experts))
            inside = ratios(mine, fit | own | {"by_kind": {}}, "prefill")
            fit["by_kind"][kind] = own | {"spread": fit["spread"] | {"prefill": spread(inside)}}
    return fit


Axis = tuple[str, tuple[float, ...]]


def kinds_of(rows: list[Row]) -> list[str]:
    """Kinds of operation that the models of these rows have: what a fit to them can know about."""
    specs = {row.spec.name: row.spec for row in rows}.values()
    return sorted({op.kind for spec in specs for op in spec.work(Request().step(1))})


def least(rows: list[Row], fit: dict[str, Any], phase: str, axes: tuple[Axis, Axis]) -> dict[str, float]:
    """The two numbers that leave the least error; a far outlier counts no more than a factor e."""
    (first, firsts), (second, seconds) = axes
    trials = []
    for one, two in product(firsts, seconds):
        values = ratios(rows, fit | {first: one, second: two, "by_kind": {}}, phase)
        if values:
            trials.append((sum(min(abs(math.log(value)), 1.0) for value in values) / len(values), one, two))
    _, one, two = min(trials)
    return {first: one, second: two}


def spread(inside: list[float]) -> list[float]:
    """[low, high] factors between which eight of ten published times lie around the predicted one."""
    if len(inside) < 4:
        return [0.5, 2.0]
    cuts = quantiles(inside, n=10)
    return [round(min(0.95, 1 / cuts[-1]), 3), round(max(1.05, 1 / cuts[0]), 3)]


def left_out(rows: list[Row]) -> list[dict[str, Any]]:
    """Each device with its errors under a fit to all the others of its engine and vendor, for those with two or more."""
    found = []
    groups = sorted({(row.engine, row.hardware.vendor) for row in rows if row.split == "calibration"})
    for engine, vendor in groups:
        mine = [r for r in rows if (r.engine, r.hardware.vendor, r.split) == (engine, vendor, "calibration")]
        for device in sorted({row.hardware.id for row in mine}):
            others = [row for row in mine if row.hardware.id != device]
            if sum(row.phase == "decode" for row in others) < 8:
                continue
            fit, out = best_fit(others), [row for row in mine if row.hardware.id == device]
            one: dict[str, Any] = {"engine": engine, "vendor": vendor, "device": device, "kind": out[0].hardware.kind}
            for phase in ("decode", "prefill"):
                values = ratios(out, fit, phase)
                one[phase] = {"rows": len(values), "median_error": round(error(values), 4) if values else None}
            found.append(one)
            shown = [
                f"{one[p]['median_error']:.1%} of {one[p]['rows']}" if one[p]["rows"] else "-"
                for p in ("decode", "prefill")
            ]
            print(
                f"{engine:13s} {vendor:8s} without {device:16s} decode {shown[0]:>14s} prefill {shown[1]:>14s}",
                flush=True,
            )
    return found


def fit_of(fitted: list[Row], unseen: list[Row]) -> dict[str, Any]:
    """The best fit to some rows, with its errors on them and on those of devices it has not seen, and what it was made from."""
    fit = best_fit(fitted)
    judged = {}
    for phase in ("decode", "prefill"):
        inside, outside = (ratios(rows, fit, phase) for rows in (fitted, unseen))
        judged[phase] = {
            "rows_fitted": len(inside), "median_error_fitted": round(error(inside), 4) if inside else None,
            "rows_unseen": len(outside), "median_error_unseen": round(error(outside), 4) if outside else None,
            "within_range_fitted": within(fitted, fit, phase),
            "within_range_unseen": within(unseen, fit, phase),
        }  # fmt: skip
    fit["made"] = {
        "date": "2026-11", "judged": judged, "kinds": kinds_of(fitted),
        "devices": sorted({row.hardware.id for row in fitted}),
        "sources": sorted({row.source.split(":")[0] for row in fitted}),
    }  # fmt: skip
    return fit


def print_fit(engine: str, vendor: str, judged: dict[str, dict[str, Any]]) -> None:
    """A line for each phase: errors and rows on both sides, and how many lie within the range that is shown."""
    for phase, row in judged.items():
        sides = ("fitted", "unseen")
        errors = [(row[f"median_error_{side}"], row[f"rows_{side}"]) for side in sides]
        shown = [f"{error:.1%} of {count}" if count else "-" for error, count in errors]
        covered = [row[f"within_range_{side}"] for side in sides]
        print(f"{engine:13s} {vendor:8s} {phase:8s} {shown[0]:>14s} {shown[1]:>18s}  within the range {covered}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the fit in profiles/data/engines.json")
    parser.add_argument("--leave-one-out", action="store_true", help="judge each fitted device by the others")
    arguments = parser.parse_args()
    raw = [
        row
        for row in json.loads(arguments.data.read_text())["rows"]
        if row["quality"] == "ok" and row["task"] == "inference"
    ]
    rows = [row for row in map(row_of, raw) if row is not None]
    if arguments.leave_one_out:
        what = "Median error on each device under a fit to all others (benchmarks/engines.py)"
        LEFT_OUT.write_text(json.dumps({"what": what, "rows": left_out(rows)}, indent=1) + "\n", encoding="utf-8")
        return
    engines: dict[str, dict[str, Any]] = {}
    print(f"{'engine':13s} {'vendor':8s} {'phase':8s} {'fitted':>14s} {'unseen devices':>18s}")
    for engine, vendor in sorted({(row.engine, row.hardware.vendor) for row in rows}):
        sides = [
            [row for row in rows if (row.engine, row.hardware.vendor, row.split) == (engine, vendor, split)]
            for split in ("calibration", "validation")
        ]
        if sum(row.phase == "decode" for row in sides[0]) >= FEWEST_DECODES:
            fit = fit_of(*sides)
            print_fit(engine, vendor, fit["made"]["judged"])
            engines.setdefault(engine, {})[vendor] = fit
    if arguments.write:
        what = "Engines fitted to public figures (benchmarks/engines.py): factors on the ordinary efficiencies of accelerators"
        TARGET.write_text(json.dumps({"what": what, "engines": engines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
