"""How well predictions meet measurements on this machine: calibrate, predict, measure, row by row.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py [--visits 3] [--models A,B] [--table FILE] [--again FILE] [--ship]
    OMP_NUM_THREADS=2 python benchmarks/accuracy.py --ship --table-only

Sixteen models of all families, from 20M to 1B parameters: prefill at three lengths, decode at three depths, a training step.
A shared machine changes its pace within minutes. So everything is visited three times in turn, calibration and models alike;
a visit's time is the median of its runs, and the middle visit counts, on both sides: the median of three times is held against
a table each point of which is the median of three calibrations. (The fastest visit would favour the table: each of its points
is short and finds a lucky moment, a model would need a lucky minute.) A user has one calibration and one run: every visit's
times are also held against that visit's own table. Each visit to a model is a process of its own, as a user's run is. With
one thread the clock is the process's own CPU time. Prints a row for each and the errors over all, and writes
benchmarks/results/accuracy-<machine>.json with versions, every visit's time and the load of the machine. About a quarter of
an hour; --ship also keeps the table, with the range that the rows give it, among those that come with the package, and writes
the errors into docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import names, published
from archcompass.errors import ArchcompassError
from archcompass.profiles.calibrate import calibrate
from archcompass.profiles.efficiency import Efficiency, from_json, middle, shipped, to_json
from archcompass.profiles.hardware import Hardware, find
from archcompass.profiles.measure import build, heap
from archcompass.profiles.measure.clock import repeat
from archcompass.profiles.measure.model import decode, prefill, training_step
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request
from archcompass.profiles.tables import efficiency_of, file_name

Question = tuple[str, int, int]
"""Phase, tokens of the prompt, tokens generated."""

Visits = dict[str, dict[Question, list[float]]]
"""Milliseconds of each visit, by model and question."""

Errors = dict[str, float]
"""How many rows, their median and ninth decile."""

RESULTS = Path(__file__).resolve().parent / "results"
TABLES = RESULTS.parent.parent / "profiles/data/efficiency"
DOCUMENT = RESULTS.parent.parent / "docs/accuracy.md"
DTYPES = ("bf16", "fp32")

GOAL = (0.10, 0.25)
"""Median and ninth decile of the errors."""

CPU = torch.device("cpu")

LENGTHS = (128, 512, 1024)
GENERATED = 16
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


def visit_alone(spec: ModelSpec, quick: bool) -> dict[Question, float]:
    """`visit` in a process of its own, as a user's run is: after ten other models a training step took a third longer."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(visit, spec, quick).result()


@heap.held()
def visit(spec: ModelSpec, quick: bool) -> dict[Question, float]:
    """Milliseconds of every question to one model, each the median of its runs after one that is not heard."""
    model, times = build.model(spec, CPU, torch.bfloat16), dict[Question, float]()
    with torch.inference_mode():
        for length in LENGTHS[:1] if quick else LENGTHS:
            asked = Request(prompt=length, generate=GENERATED)
            ids = torch.randint(0, spec.vocab_size, (1, length))
            first = prefill(model, ids, asked)
            again = repeat(partial(prefill, model, ids, asked), CPU, seconds=1.0, least=1, most=5, warmups=0)
            times["prefill", length, GENERATED] = again.ms
            steps = decode(model, first, asked, CPU, deadline=math.inf)
            assert steps is not None
            times["decode", length, GENERATED] = steps.ms
    if spec.parameters().total <= TRAINED_PARAMETERS:
        times["training", TRAINED_TOKENS, 0] = trained(spec)
    return times


def trained(spec: ModelSpec) -> float:
    """Milliseconds of a training step, moments being there."""
    model = build.model(spec, CPU, torch.bfloat16, training=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, spec.vocab_size, (1, TRAINED_TOKENS))
    return repeat(partial(training_step, model, optimizer, ids), CPU, seconds=1.0, least=2, most=5).ms


def predicted_ms(spec: ModelSpec, question: Question, table: Efficiency, here: Hardware) -> float:
    phase, tokens, generated = question
    training = phase == "training"
    request = Request(prompt=tokens, generate=generated, mode="training" if training else "inference")
    made = predict(spec, request, here, efficiency=table)
    found = made.decode_ms_per_token if phase == "decode" else made.prefill_ms
    assert found is not None, made.verdict
    return found


def rows_of(
    spec: ModelSpec, visits: dict[Question, list[float]], table: Efficiency, here: Hardware
) -> list[dict[str, Any]]:
    """Measured and predicted times of one model."""
    rows = []
    for question, times in visits.items():
        foreseen, seen = predicted_ms(spec, question, table, here), median(times)
        phase, tokens, generated = question
        rows.append({
            "model": spec.name, "parameters": spec.parameters().total, "phase": phase, "tokens": tokens,
            "generate": generated, "visits_ms": [round(ms, 3) for ms in times], "measured_ms": round(seen, 3),
            "predicted_ms": round(foreseen, 3), "ratio": round(foreseen / seen, 4),
        })  # fmt: skip
    return rows


def each_visit(
    chosen: list[ModelSpec], found: Visits, tables: list[Efficiency], here: Hardware
) -> list[dict[str, Any]]:
    """Rows of every visit's times by that visit's own table: one calibration and one run, as a user has them."""
    rows = []
    for number, table in enumerate(tables):
        for spec in (spec for spec in chosen if spec.name in found):
            own = {question: times[number:][:1] for question, times in found[spec.name].items() if times[number:]}
            rows += rows_of(spec, own, table, here)
    return rows


def kept_visits(path: Path) -> Visits:
    """What an earlier run measured."""
    found: Visits = {}
    for row in json.loads(path.read_text())["rows"]:
        question = (row["phase"], row["tokens"], row["generate"])
        found.setdefault(row["model"], {})[question] = row["visits_ms"]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Errors]:
    """Median and ninth decile of |ratio - 1|, by phase and over all."""
    found = {}
    for phase in ("prefill", "decode", "training", "all"):
        errors = [abs(row["ratio"] - 1) for row in rows if phase in ("all", row["phase"])]
        if len(errors) > 1:
            found[phase] = errors_of(errors)
    return found


def errors_of(errors: list[float]) -> Errors:
    p90 = quantiles(errors, n=10)[-1]
    return {"rows": len(errors), "median_error": round(median(errors), 4), "p90_error": round(p90, 4)}


def calibrated(dtypes: tuple[str, ...], blocks: Collection[str] | None = None) -> Efficiency:
    """A table measured now, of all kinds of block or some."""

    def watched(share: float, text: str) -> None:
        print(f"\r{share:4.0%} {text:40s}", end="", file=sys.stderr)

    return calibrate("cpu", progress=watched, budget_seconds=900, keep=False, dtypes=dtypes, blocks=blocks)[0]


def visited(
    chosen: list[ModelSpec], visits: int, quick: bool, given: Efficiency | None, ship: bool
) -> tuple[Visits, list[Efficiency], dict[str, str]]:
    """Times of every model by question, each visit's table, and why some failed. The first calibration measures everything
    where its table is to `ship`, all others what the models need."""
    tables, failed = [given] * visits if given else [], dict[str, str]()
    kinds = {block.kind for spec in chosen for block in spec.blocks.values()}
    found: Visits = {}
    for number in range(visits):
        if given is None:
            tables.append(calibrated(DTYPES) if ship and not number else calibrated(DTYPES[:1], kinds))
        for spec in chosen:
            print(f"\rvisit {number + 1}: {spec.name:40s}", end="", file=sys.stderr)
            try:
                times = visit_alone(spec, quick)
            except ArchcompassError as error:
                failed[spec.name] = str(error)
                continue
            for question, ms in times.items():
                found.setdefault(spec.name, {}).setdefault(question, []).append(ms)
    return found, tables, failed


def factors(rows: list[dict[str, Any]], phase: str) -> list[float]:
    """Every visit's measured time over the predicted one."""
    return [ms / row["predicted_ms"] for row in rows if row["phase"] == phase for ms in row["visits_ms"]]


def spread(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Eight of ten visits lie between these factors on the predicted time."""
    found = {}
    for phase in ("prefill", "decode"):
        tenths = quantiles(factors(rows, phase), n=10)
        found[phase] = (round(min(tenths[0], 1.0), 2), round(max(tenths[-1], 1.0), 2))
    return found


def within(rows: list[dict[str, Any]], table: Efficiency) -> dict[str, float]:
    """Share of visits that lie in the range `table` states around its predictions; eight of ten are meant to."""
    found = {}
    for phase, (low, high) in table.spread.items():
        seen = factors(rows, phase)
        found[phase] = sum(low <= factor <= high for factor in seen) / max(len(seen), 1)
    return found


def kept(table: Efficiency, here: Hardware) -> None:
    """Writes `table` where the package finds it."""
    target = TABLES / f"{file_name(here)}.json"
    target.write_text(json.dumps(to_json(table)) + "\n", encoding="utf-8")
    print(f"kept {target.name}")


ROW_NAMES = {
    "prefill": "prefill, up to 1,024 tokens", "decode": "decode", "training": "training step", "all": "all",
    "one visit": "one calibration, one run",
}  # fmt: skip


def documented(rows: list[dict[str, Any]], errors: dict[str, Errors], covered: dict[str, float]) -> None:
    """Rewrites the errors in docs/accuracy.md, between their marks; `covered` by the range shipped before."""
    begin, end = "<!-- accuracy.py writes this -->\n", "<!-- until here -->"
    lines = ["| phase | rows | median | 90th percentile | in the range stated before |", "|---|---|---|---|---|"]
    lines += [
        f"| {ROW_NAMES[phase]} | {found['rows']} | {found['median_error']:.1%} | {found['p90_error']:.1%} "
        f"| {format(covered[phase], '.0%') if phase in covered else '-'} |"
        for phase, found in errors.items()
    ]
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    text = "\n".join([*lines, "", *in_words(rows, errors["all"])]).replace("%", " %")
    DOCUMENT.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def in_words(rows: list[dict[str, Any]], errors: Errors) -> list[str]:
    """When and with what it was measured, whether the goal is met, and what is furthest off."""
    met = errors["median_error"] <= GOAL[0] and errors["p90_error"] <= GOAL[1]
    fast = sum(row["ratio"] < 1 for row in rows) / len(rows)
    models = {row["model"]: [other["ratio"] for other in rows if other["model"] == row["model"]] for row in rows}
    middles = {name: median(ratios) for name, ratios in models.items()}
    furthest = sorted(middles, key=lambda name: -abs(middles[name] - 1))[:4]
    named = ", ".join(
        f"{name} {abs(middles[name] - 1):.0%} too {'fast' if middles[name] < 1 else 'slow'}" for name in furthest
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [
        f"Measured {date} with torch {torch.__version__.split('+')[0]}; the goal of {GOAL[0]:.0%} and {GOAL[1]:.0%} is "
        f"{'met' if met else 'missed'}. Of all rows {fast:.0%} are predicted too fast.",
        f"Furthest off, over all rows of a model: {named}.",
    ]


def told(rows: list[dict[str, Any]], errors: dict[str, Errors], failed: dict[str, str]) -> None:
    """Prints the rows and the errors over all."""
    print(f"\n{'model':24s} {'phase':9s} {'tokens':>6s} {'measured ms':>12s} {'predicted ms':>12s} {'ratio':>6s}")
    for row in rows:
        shown = f"{row['measured_ms']:12.2f} {row['predicted_ms']:12.2f} {row['ratio']:6.2f}"
        print(f"{row['model']:24s} {row['phase']:9s} {row['tokens']:6d} {shown}")
    for phase, found in errors.items():
        print(f"{phase:9s} {found['rows']:4.0f} rows  median {found['median_error']:.1%}  p90 {found['p90_error']:.1%}")
    for name, why in failed.items():
        print(f"{name} failed: {why}")


def main() -> None:
    arguments, here, load_before = asked(), find("cpu"), os.getloadavg()[0]
    if arguments.table_only:
        kept(calibrated(DTYPES), here)
        return
    given = from_json(json.loads(arguments.table.read_text()), arguments.table.name) if arguments.table else None
    known = models(arguments.quick and not arguments.models)
    chosen = [spec for spec in known if not arguments.models or spec.name in arguments.models.split(",")]
    if arguments.again:
        found, tables, failed = kept_visits(arguments.again), [given or efficiency_of(here)], dict[str, str]()
    else:
        found, tables, failed = visited(chosen, arguments.visits, arguments.quick, given, arguments.ship)
    table = middle(tables)
    rows = [row for spec in chosen if spec.name in found for row in rows_of(spec, found[spec.name], table, here)]
    single = [] if arguments.again else each_visit(chosen, found, tables, here)
    errors = summary(rows) | ({"one visit": summary(single)["all"]} if single else {})
    told(rows, errors, failed)
    if arguments.ship:
        before = shipped(file_name(here)) or efficiency_of(here)
        again = [row for spec in chosen if spec.name in found for row in rows_of(spec, found[spec.name], before, here)]
        kept(replace(table, spread=spread(rows)), here)
        documented(rows, errors, within(again, before))
    written(rows, single, errors, failed, load_before, arguments.out or RESULTS / f"accuracy-{file_name(here)}.json")


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=3, help="how often calibration and models take turns")
    parser.add_argument("--models", default="", help="only these, with commas")
    parser.add_argument("--quick", action="store_true", help="one length, one dtype, and two models if none are named")
    parser.add_argument("--table", type=Path, help="an efficiency table instead of calibrating now")
    parser.add_argument("--again", type=Path, help="an earlier run's results: predict anew what it measured")
    parser.add_argument("--ship", action="store_true", help="keep the table in profiles/data/efficiency")
    parser.add_argument("--table-only", action="store_true", help="measure no model")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def written(
    rows: list[dict[str, Any]],
    single: list[dict[str, Any]],
    errors: dict[str, Errors],
    failed: dict[str, str],
    load_before: float,
    target: Path,
) -> None:
    """Writes the rows with what they were measured on."""
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": find("cpu").name,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "clock": "process CPU time" if torch.get_num_threads() == 1 else "wall",
        "load_before": round(load_before, 2), "load_after": round(os.getloadavg()[0], 2),
        "summary": errors, "range_of_one_visit": spread(single) if single else None, "failed": failed, "rows": rows,
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
