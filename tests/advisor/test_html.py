"""The report as a page: whole, escaped, silent, and drawn by a real browser where there is one."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from archcompass.advisor.diff import changes
from archcompass.advisor.pictures import gather
from archcompass.advisor.recommend import recommend
from archcompass.advisor.report import figures
from archcompass.advisor.report.html import page
from archcompass.advisor.workload import Workload

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    workload = Workload(context="128k", recall="high", breadth="broad", gpu="h100-sxm", concurrency=4)
    answer = recommend(workload)
    return {
        "recommendation": answer.model_dump(mode="json"),
        "pictures": gather(workload, answer),
        "versions": {"archcompass": "0"},
    }


def test_the_page_is_one_small_file_that_loads_nothing(report: dict[str, Any]) -> None:
    text = page(report, "archcompass advise")
    ours = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert len(text.encode()) < 6_000_000
    assert "default-src 'none'" in ours
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?https?:", ours)


def test_what_a_stranger_named_is_shown_and_never_run(report: dict[str, Any]) -> None:
    evil = "</script><script>alert(1)</script>"
    poisoned = report | {"recommendation": report["recommendation"] | {"notes": [evil]}}
    poisoned["recommendation"]["hardware"] = report["recommendation"]["hardware"] | {"name": evil}
    text = page(poisoned, f"archcompass {evil}")
    assert evil not in text
    assert text.count("<script") == page(report, "x").count("<script")


def test_every_candidate_rule_and_published_model_is_on_the_page(report: dict[str, Any]) -> None:
    text, answer = page(report, "x"), report["recommendation"]
    for word in [c["name"] for c in answer["candidates"]] + [m["name"] for m in answer["published"]]:
        assert word in text
    assert "Every number" in text


def test_a_difference_is_told_and_sameness_is_silence(report: dict[str, Any]) -> None:
    answer = report["recommendation"]
    assert changes(answer, answer) == []
    other = recommend(Workload(context="4k", recall="high", breadth="broad", gpu="h100-sxm", concurrency=4))
    rows = {row["what"]: row for row in changes(answer, other.model_dump(mode="json"))}
    assert rows["workload context"]["before"] == 131072
    assert rows["workload context"]["change"].startswith("-")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_chart_without_a_word_on_its_console(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(report, "x"))
    command = [
        str(BROWSER),
        *QUIET,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    drawn = re.search(r'data-drawn="(\d+)"', done.stdout)
    assert drawn is not None
    assert int(drawn[1]) == 6
    assert done.stdout.count('class="plot-container') == 6
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    ("low", "high"), [(0.55, 0.95), (10.2, 36.0), (20.0, 35.0), (1.0, 2.0), (0.01, 900.0), (1e-3, 1e7)]
)
def test_an_axis_has_marks_to_read_and_not_too_many(low: float, high: float) -> None:
    marks = figures.log_ticks([low, high])["tickvals"]
    assert 3 <= sum(low <= mark <= high for mark in marks) <= 11


def test_the_page_says_what_was_asked_and_how_to_ask_it_again(report: dict[str, Any]) -> None:
    text = page(report, "archcompass advise workload.yaml -o out/")
    assert "Asked: context 128k, breadth broad, recall high, concurrency 4, gpu h100-sxm" in text
    given = re.findall(r"<pre>(.*?)</pre>", text, re.S)[-1]
    again = Workload(**yaml.safe_load(unescape(given)))
    assert recommend(again).model_dump(mode="json") == report["recommendation"]
