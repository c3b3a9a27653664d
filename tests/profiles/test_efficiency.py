"""Efficiency curves interpolate inside, hold at the edge, and survive their file; tables are chosen in the right order."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archcompass.blocks.base import Op
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import FileFormatError, InputError
from archcompass.profiles import tables
from archcompass.profiles.efficiency import ACCELERATOR, PROCESSOR, Curve, Efficiency, from_json, scaled, to_json
from archcompass.profiles.hardware import describe, find
from archcompass.profiles.measure.launches import launches
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request

GRID = Curve((1.0, 16.0, 256.0), (64.0, 4096.0), ((0.1, 0.2), (0.4, 0.5), (0.8, 0.6)))


def test_a_curve_goes_through_its_points() -> None:
    for row, x in enumerate(GRID.x):
        for column, y in enumerate(GRID.y):
            assert GRID.at(x, y) == GRID.values[row][column]


def test_beyond_its_points_a_curve_holds_the_edge() -> None:
    assert GRID.at(1e9, 64.0) == 0.8
    assert GRID.at(1.0, 1.0) == 0.1
    assert GRID.at(1e9, 1e9) == 0.6
    assert not GRID.covers(1e9, 64.0)
    assert GRID.covers(20.0, 100.0)


def test_between_points_the_logarithm_is_interpolated() -> None:
    assert GRID.at(4.0, 64.0) == pytest.approx((0.1 * 0.4) ** 0.5)
    assert GRID.at(1.0, 512.0) == pytest.approx((0.1 * 0.2) ** 0.5)


@given(
    st.dictionaries(st.integers(0, 12).map(lambda n: 4.0**n), st.floats(1e-4, 4.0), min_size=1),
    st.floats(0.1, 1e8),
    st.floats(1.0, 1e3),
)
def test_a_levelled_curve_never_takes_less_time_for_more_work(
    points: dict[float, float], x: float, more: float
) -> None:
    curve = Curve.over(scaled(points))
    assert x * more / curve.at(x * more) >= x / curve.at(x) * (1 - 1e-9)


@pytest.mark.parametrize("table", [ACCELERATOR, PROCESSOR], ids=lambda table: table.name)
def test_a_table_survives_its_file(table: Efficiency) -> None:
    back = from_json(json.loads(json.dumps(to_json(table))))
    assert back.kinds == table.kinds
    assert back.spread == table.spread


@pytest.mark.parametrize(
    "damage",
    [{"archcompass_efficiency": 99}, {"kinds": None}, {"peaks": 3}, {"step_seconds": None},
     {"layer_seconds": "soon"}, {"spread": {"decode": [1]}},
     {"kinds": {"gemm": {"compute": {"x": [2, 1], "y": [1], "values": [[1], [1]]}, "memory": {}, "launch_seconds": 0}}}],
)  # fmt: skip
def test_a_broken_table_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(FileFormatError, match="calibrate again"):
        from_json(to_json(ACCELERATOR) | damage, where="mine.json")


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "{}", "\x00"])
def test_a_broken_file_of_this_user_is_refused_with_its_name(content: str, no_calibration_of_this_user: Path) -> None:
    no_calibration_of_this_user.mkdir(parents=True)
    (no_calibration_of_this_user / f"{tables.file_name(find('rtx-4090'))}.json").write_text(content)
    tables.forget()
    with pytest.raises(FileFormatError, match="rtx-4090-native"):
        tables.efficiency_of(find("rtx-4090"))


def test_a_calibration_of_this_user_comes_first_and_says_so(
    llama: ModelSpec, no_calibration_of_this_user: Path
) -> None:
    card = find("rtx-4090")
    before = predict(llama, Request(), card)
    path = tables.save(replace(ACCELERATOR, source="calibrated", step_seconds=0.5), card)
    after = predict(llama, Request(), card)
    assert path.parent == no_calibration_of_this_user
    assert (before.source, after.source) == ("roofline", "calibrated")
    assert after.decode_ms_per_token is not None
    assert after.decode_ms_per_token > 500
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_interrupted_calibration_leaves_the_old_table_whole(
    monkeypatch: pytest.MonkeyPatch, no_calibration_of_this_user: Path
) -> None:
    card = find("rtx-4090")
    path = tables.save(replace(ACCELERATOR, step_seconds=0.25), card)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        tables.save(replace(ACCELERATOR, step_seconds=0.75), card)
    tables.forget()
    assert tables.efficiency_of(card).step_seconds == 0.25
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal
from archcompass.profiles import tables
from archcompass.profiles.efficiency import ACCELERATOR
from archcompass.profiles.hardware import find

os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
tables.save(ACCELERATOR, find("rtx-4090"))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_calibration_leaves_the_old_table_whole(no_calibration_of_this_user: Path) -> None:
    card = find("rtx-4090")
    tables.save(replace(ACCELERATOR, step_seconds=0.25), card)
    ended = subprocess.run([sys.executable, "-P", "-c", KILLED], check=False)
    assert ended.returncode == -signal.SIGKILL
    tables.forget()
    assert tables.efficiency_of(card).step_seconds == 0.25


def test_a_processor_nobody_measured_borrows_from_the_nearest_and_says_so(llama: ModelSpec) -> None:
    here = find("cpu")
    known = from_json(json.loads(SHIPPED_PROCESSOR.read_text()))
    other = replace(here, name="Some other", architecture=f"{known.made['machine']} of tomorrow", vendor="Nobody")
    twice = replace(other, flops={name: 2 * rate for name, rate in other.flops.items()})
    table = tables.borrowed(other)
    assert table.source == "roofline"
    assert table.name in {
        f"efficiencies measured on {one.name}, scaled to this machine" for one in tables._shipped_processors()
    }
    assert table.spread == PROCESSOR.spread
    assert tables.borrowed(twice).peaks["bf16"] == pytest.approx(2 * table.peaks["bf16"])
    made = predict(llama, Request(prompt=512), other)
    assert (made.source, made.basis) == ("roofline", table.name)


def test_what_is_probed_here_is_not_scaled_again() -> None:
    known = from_json(json.loads(SHIPPED_PROCESSOR.read_text()))
    probed = replace(find("cpu"), architecture=f"{known.made['machine']} of tomorrow", confidence="measured here")
    assert tables.borrowed(probed).peaks == {}


def test_a_processor_of_another_kind_borrows_nothing() -> None:
    assert tables.borrowed(replace(find("cpu"), architecture="riscv64 0")) is PROCESSOR


def test_training_factors_go_by_block_then_by_kind() -> None:
    table = replace(ACCELERATOR, training={"mamba2:bf16": 1.5, "gemm:bf16": 1.25})
    product = Op("gemm", "in", 1.0, shape=(1, 1, 1))
    assert table.trained(product, "mamba2") == 1.5
    assert table.trained(product, "gated_mlp") == 1.25
    assert table.trained(Op("scan", "scan", 1.0), "mamba") == 1.0


def test_a_launch_bound_step_is_told_what_a_graph_would_give(llama: ModelSpec) -> None:
    card, small = find("h200"), llama.with_layers("2*(attention mlp)")
    slow = {kind: replace(curves, launch_seconds=1e-2) for kind, curves in ACCELERATOR.kinds.items()}
    table = replace(ACCELERATOR, kinds=slow, launches={"eager": 5e-6, "graph": 1e-6})
    plain = predict(small, Request(), card, efficiency=replace(table, launches={}))
    graph = predict(small, Request(), card, efficiency=table)
    assert plain.decode_ms_per_token == graph.decode_ms_per_token
    assert not any("CUDA graph" in note for note in plain.notes)
    (note,) = (note for note in graph.notes if "CUDA graph" in note)
    assert graph.decode_ms_per_token is not None
    assert float(note.split()[-2]) == pytest.approx(graph.decode_ms_per_token / 5, rel=0.05)


def test_launches_are_measured_on_accelerators_alone() -> None:
    assert launches(torch.device("cpu")) == {}
    if torch.cuda.is_available():
        found = launches(torch.device("cuda"))
        assert 0 < found["graph"] < found["eager"] < 1e-3


def test_measured_peaks_stand_for_the_data_sheets(llama: ModelSpec) -> None:
    card = find("rtx-4090")
    slow = replace(ACCELERATOR, peaks={"bandwidth": card.bandwidth_bytes_per_second / 2})
    one, two = predict(llama, Request(), card), predict(llama, Request(), card, efficiency=slow)
    assert two.decode_ms_per_token is not None
    assert one.decode_ms_per_token is not None
    assert 1.8 < two.decode_ms_per_token / one.decode_ms_per_token < 2.1


def test_an_engine_learnt_from_public_figures_differs_from_ours(llama: ModelSpec) -> None:
    card = find("rtx-4090")
    made = predict(llama, Request(precision="q4_k_m", prompt=512, engine="llama.cpp"), card)
    assert made.source == "calibrated"
    assert made.decode_ms_per_token == pytest.approx(1e3 / 128, rel=0.15)  # XiongjieDai's table: 127.7 tokens a second
    assert made.low["decode"] < 1 < made.high["decode"]


@pytest.mark.parametrize(
    ("engine", "card"), [("vllm", "mi300x"), ("transformers", "m3-max-40c"), ("llama.cpp", "arc-b580")]
)
def test_an_engine_without_data_is_refused(engine: str, card: str, llama: ModelSpec) -> None:
    with pytest.raises(InputError, match=f"engine is '{engine}'.*nearest: native"):
        predict(llama, Request(engine=engine), find(card))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="engine"):
        predict(llama, Request(engine=engine), describe(vram=80, bandwidth=2000, tflops=500))  # type: ignore[arg-type]


def test_fitted_engines_say_on_what_they_were_judged() -> None:
    made = tables.efficiency_of(find("rtx-4090"), "llama.cpp").made
    assert made["judged"]["decode"]["median_error_unseen"] < 0.15
    assert made["judged"]["prefill"]["median_error_unseen"] < 0.35
    assert made["sources"]


def test_training_is_fitted_to_public_runs_for_cards_like_theirs(llama: ModelSpec) -> None:
    made = tables.efficiency_of(find("h100-sxm"), training=True)
    assert made.source == "calibrated"
    assert made.made["judged"]["fitted"]["median_error"] < 0.1
    assert "scan" not in made.made["kinds"]
    asked = Request(mode="training", batch=16, prompt=2048, generate=0, parallel="data")
    fitted, sheet = (predict(llama, asked, find("8x h200"), efficiency=table) for table in (None, ACCELERATOR))
    assert fitted.prefill_ms > sheet.prefill_ms  # type: ignore[operator]
    for other in ("b200", "rtx-4090", "mi300x"):
        assert tables.efficiency_of(find(other), training=True).source == "roofline"


def test_an_engine_that_serves_is_not_asked_to_train(llama: ModelSpec) -> None:
    with pytest.raises(InputError, match=r"engine is 'vllm'.*nearest: native"):
        predict(llama, Request(engine="vllm", mode="training", generate=0), find("h100-sxm"))


SHIPPED_PROCESSOR = min((Path(tables.__file__).parent / "data" / "efficiency").glob("cpu-*.json"))
SHIPPED = sorted((Path(tables.__file__).parent / "data" / "efficiency").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_table_says_when_and_with_what_it_was_made(path: Path) -> None:
    table = from_json(json.loads(path.read_text()), where=path.name)
    assert table.source == "calibrated"
    assert {"date", "torch", "threads", "device", "load"} <= set(table.made)
    assert "/home" not in path.read_text()
    assert table.kinds.keys() >= {"gemm:bf16", "attention:bf16", "gated_mlp/activation:bf16"}


def test_at_least_one_machine_is_shipped() -> None:
    assert SHIPPED
