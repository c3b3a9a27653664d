"""The comparison: predicted along a sweep, measured with real blocks on this machine, told as data, table and picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archcompass.advisor.compare import compare, compare_here
from archcompass.advisor.report.compare import _per_token, page
from archcompass.advisor.sizing.shapes import FAMILIES
from archcompass.advisor.workload import Workload
from archcompass.profiles.hardware import find

ASKED = Workload(context="4k", gpu="rtx-4090", concurrency=1)
SMALL = ("--values", "64,128", "--scale", "200k", "--seconds", "4", "--gpu", "rtx-4090", "--concurrency", "1")


def test_measured_points_lie_on_the_places_that_were_predicted() -> None:
    told: list[tuple[float, str]] = []
    found = compare_here(
        ASKED, values=(64, 128), seconds=4, parameters=200_000, progress=lambda share, text: told.append((share, text))
    )
    predicted = {(point.family, point.context): point for point in found.points}
    assert {point.family for point in found.measured} == set(FAMILIES) == set(found.models)
    for point in found.measured:
        line = predicted[point.family, point.context]
        assert (point.source, line.source) == ("measured", line.source)
        assert point.prefill_ms is not None
        assert point.prefill_ms > 0
        assert point.decode_ms_per_token is not None
        assert 0.2 < point.memory_bytes / line.memory_bytes < 5
    assert all(facts["total"] < 1_000_000 for facts in found.models.values())
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_square_shows_where_the_cost_of_one_token_rises() -> None:
    places = (2**14, 2**16, 2**18)
    data = compare(Workload(context="16k", gpu="8x h200", concurrency=1), values=places).model_dump(mode="json")
    shared = _per_token(data)["points"]

    def growth(family: str) -> float:
        first, last = (next(p for p in shared if (p["family"], p["context"]) == (family, c)) for c in (2**14, 2**18))
        return float(last["prefill_ms"] / first["prefill_ms"])

    assert growth("ssm") == pytest.approx(1.0, abs=0.05)
    assert growth("transformer") > 2.0


def test_a_comparison_says_its_range_and_what_the_cards_hold() -> None:
    found = compare(ASKED, values=(4096,))
    assert found.capacity_bytes == find("rtx-4090").memory_bytes
    assert found.range["prefill"] == pytest.approx((0.65, 2.0))
    assert not found.notes
    trained = compare(Workload(context="4k", gpu="8x h100-sxm", mode="training"), values=(4096,))
    assert "training" in trained.notes[0]


def test_batches_are_measured_too() -> None:
    found = compare_here(ASKED, "batch", (1, 2), seconds=4, parameters=200_000)
    assert {point.batch for point in found.measured if point.family == "ssm"} <= {1, 2}
    assert {point.batch for point in found.measured} >= {1}


def test_a_place_that_would_take_too_long_is_left_out() -> None:
    found = compare_here(ASKED, values=(64, 2**18), seconds=0.5, parameters=200_000)
    assert {point.context for point in found.measured} == {64}
    assert {point.context for point in found.points} == {64, 2**18}


def test_nothing_is_measured_unless_asked_for() -> None:
    found = compare(ASKED, values=(4096, 8192))
    assert found.measured == found.measured_crossovers == ()
    assert {point.source for point in found.points} == {"roofline"}


def test_the_command_measures_tells_and_draws(cli: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "compare.html"
    data = json.loads(cli("compare", "--measure", *SMALL, "--json", "-o", picture).out)
    assert {"sweep", "points", "crossovers", "measured", "measured_crossovers"} <= data.keys()
    assert {point["source"] for point in data["measured"]} == {"measured"}
    text = picture.read_text()
    assert "measured on this machine" in text
    assert '"transformer, measured"' in text
    table = cli("compare", "--measure", *SMALL).out
    assert " / " in table
    assert "measured on this machine" in " ".join(table.split())


def test_the_picture_escapes_what_it_is_given() -> None:
    data = compare(ASKED, values=(4096,)).model_dump(mode="json") | {"hardware": "<script>alert(1)</script>"}
    assert "<script>alert(1)" not in page(data)


def test_a_crossing_says_what_grew_apart_there() -> None:
    found = compare(Workload(context="128k", task="code", concurrency=1, gpu="h100-sxm"))
    causes = {(cross.metric, cross.cheaper, cross.dearer): cross.cause for cross in found.crossovers}
    assert causes["memory_bytes", "ssm", "transformer"].startswith("caches and states: +")
    assert causes["prefill_ms", "ssm", "transformer"].startswith("attention: +")
    assert causes["decode_ms_per_token", "ssm", "transformer"].startswith("attention: +")
    assert "parts" not in found.model_dump()["points"][0]


def test_at_a_crossing_the_two_cost_the_same() -> None:
    work = Workload(context="128k", task="code", concurrency=1, gpu="h100-sxm")
    crossing = compare(work).crossovers
    assert {cross.metric for cross in crossing} == {"memory_bytes", "prefill_ms", "decode_ms_per_token"}
    for cross in crossing:
        here = {point.family: getattr(point, cross.metric) for point in compare(work, values=(round(cross.at),)).points}
        assert here[cross.cheaper] == pytest.approx(here[cross.dearer], rel=0.03)
