"""Calibration at a tiny scale: a whole table from real runs, which survives its file and serves predictions."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from archcompass.blocks.base import Block, known_blocks
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.runtime import Linear
from archcompass.profiles.calibrate import calibrate
from archcompass.profiles.efficiency import Curve, Efficiency, KindEfficiency, coordinates, from_json, middle, to_json
from archcompass.profiles.hardware import find
from archcompass.profiles.measure import calibrate as bench
from archcompass.profiles.measure import parts, products, training
from archcompass.profiles.measure.parts import apart
from archcompass.profiles.predict import predict
from archcompass.profiles.request import Request

CPU = torch.device("cpu")


def _few() -> Iterator[tuple[Block, int]]:
    for kind in ("gated_mlp", "moe", "mamba2"):
        yield known_blocks()[kind].tiny()[0], 64


@pytest.fixture(scope="module")
def table() -> tuple[Efficiency, list[float]]:
    """(a table, how far it was said to be)."""
    shares: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ROWS": (1, 16), "ELEMENTS": (2**12, 2**14), "EXPERT_ROWS": (1, 16), "EXPERT_ELEMENTS": (2**12, 2**14),
            "PROMPTS": (16, 32), "KEYS": (16, 32), "COLD_BYTES": 2**16,
        }.items():  # fmt: skip
            patch.setattr(products, name, value)
        patch.setattr(bench, "TOKENS", (16, 64))
        patch.setattr(parts, "COLD_BYTES", 2**22)
        patch.setattr(training, "VOCABULARY", 512)
        patch.setattr(bench, "_typical", _few)
        found, path = calibrate(keep=False, dtypes=("bf16",), progress=lambda share, _: shares.append(share))
    assert path is None
    return found, shares


def test_a_table_has_what_every_block_does(table: tuple[Efficiency, list[float]]) -> None:
    found, _ = table
    assert found.kinds.keys() >= {
        "gemm:bf16", "grouped_gemm:bf16", "attention:bf16", "gated_mlp/activation:bf16", "moe/dispatch:bf16",
        "mamba2/state space scan:bf16", "optimizer/optimizer:bf16",
    }  # fmt: skip
    assert found.training.keys() == {f"{owner}:bf16" for owner in ("gemm", "head", "gated_mlp", "moe", "mamba2")}
    assert found.made["left_out"] == []
    assert found.launches == {}
    assert found.made.keys() >= {"machine", "vendor", "estimates", "threads", "torch", "date", "clock"}


def test_progress_never_goes_back(table: tuple[Efficiency, list[float]]) -> None:
    assert table[1] == sorted(table[1])
    assert len(table[1]) > 5


def test_a_table_survives_its_file_and_serves(
    table: tuple[Efficiency, list[float]], families: dict[str, ModelSpec]
) -> None:
    back = from_json(json.loads(json.dumps(to_json(table[0]))))
    assert back.training == table[0].training
    made = predict(families["hybrid"], Request(prompt=64, generate=4), find("cpu"), efficiency=back)
    trained = predict(families["hybrid"], Request(prompt=64, generate=0, mode="training"), find("cpu"), efficiency=back)
    assert made.source == "calibrated"
    assert made.prefill_ms is not None
    assert trained.prefill_ms is not None
    assert trained.prefill_ms > made.prefill_ms


def test_linear_layers_are_told_apart_from_the_rest() -> None:
    layer, x = Linear(32, 48), torch.ones(4, 32)
    layer.reset_parameters()
    with torch.inference_mode(), apart(CPU) as seen:
        assert layer(x).shape == (4, 48)
        inside, flops = seen.seconds, seen.flops
        seen.skip(lambda: layer(x))
    assert inside > 0
    assert flops == seen.flops == 2 * 4 * 32 * 48
    assert seen.seconds > inside


def test_an_accelerator_leaves_products_out_and_counts_them() -> None:
    layer, x = Linear(32, 48), torch.ones(4, 32)
    with torch.inference_mode(), apart(torch.device("meta")) as seen:
        assert layer(x).shape == (4, 48)
    assert (seen.seconds, seen.flops) == (0.0, 2 * 4 * 32 * 48)


def test_of_several_visits_the_middle_counts(table: tuple[Efficiency, list[float]]) -> None:
    slow, middling, fast = (
        KindEfficiency(
            compute=Curve.over({1.0: share, 4.0: 0.5 - share}), memory=Curve.constant(share), launch_seconds=share
        )
        for share in (0.125, 0.25, 0.375)
    )
    visits = [replace(table[0], kinds={"gemm": k}, step_seconds=k.launch_seconds) for k in (slow, fast, middling)]
    merged = middle(visits)
    assert merged.kinds["gemm"].compute.values == ((0.25,), (0.25,))
    assert merged.kinds["gemm"].memory.values == ((0.25,),)
    assert merged.kinds["gemm"].launch_seconds == merged.step_seconds == 0.25


def test_the_pace_of_the_delta_rule_is_known_by_the_size_of_its_heads() -> None:
    typical = known_blocks()["gated_delta_net"].typical()
    assert typical is not None
    narrow, wide = Curve.over({1.0: 0.1, 64.0: 0.2}, y=4096.0), Curve.over({1.0: 0.3}, y=16384.0)
    joined = Curve.joined([wide, narrow])
    assert (joined.x, joined.y) == ((1.0, 64.0), (4096.0, 16384.0))
    assert joined.values == ((0.1, 0.3), (0.2, 0.3))
    for block, elements in ((typical[0], 128 * 128), (typical[0].other_sizes()[0], 64 * 64)):
        op = next(op for op in block.work(typical[1], Request().step(512)) if op.kind == "delta_rule")
        assert coordinates(op) == (512.0, elements)
