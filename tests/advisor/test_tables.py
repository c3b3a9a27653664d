"""Figures in tables carry the unit that their key names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archcompass.advisor.report.tables import shown

FIGURES = {
    "prefill.ms": (803.2, "803 ms"),
    "decode.ms_per_token": (3.466, "3.5 ms"),
    "hybrid first token_ms": (5816.0, "5.8 s"),
    "prefill.flops": (27.8e12, "27.8T FLOPs"),
    "flops.bf16": (121e12, "121.0 TFLOP/s"),
    "prefill.tokens_per_second": (40_830.0, "40.8k tok/s"),
    "speed.per_user": (288.5, "288 tok/s"),
    "memory.detail.activations": (425_656_320, "426 MB"),
    "bandwidth_bytes_per_second": (3e11, "300 GB/s"),
    "hybrid active parameters": (13.1e9, "13.1B"),
    "release_year": (2023, "2023"),
}


@pytest.mark.parametrize(("key", "value", "said"), [(key, *pair) for key, pair in FIGURES.items()], ids=FIGURES)
def test_a_figure_is_shown_in_the_unit_of_its_key(key: str, value: float, said: str) -> None:
    assert shown(key, value) == said


def test_a_difference_is_told_in_units(cli: Callable[..., Any], tmp_path: Path) -> None:
    answers = []
    for context in ("16k", "64k"):
        answers.append(tmp_path / f"{context}.json")
        answers[-1].write_text(cli("recommend", "--gpu", "l4", "--context", context, "--json").out)
    done = cli("diff", *answers)
    assert done.code == 1
    assert "GB" in done.out
    assert "e+" not in done.out
    assert {row["what"] for row in json.loads(cli("diff", *answers, "--json").out)} > {"hybrid memory_bytes"}
