"""The report in a real Chromium: drawn, silent, readable in light and dark, on phone and paper, by keyboard, without eyes."""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from archcompass.advisor.pictures import gather
from archcompass.advisor.recommend import recommend
from archcompass.advisor.report.html import page
from archcompass.advisor.workload import Workload

ROOT = Path(__file__).resolve().parent.parent.parent


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("browser", ROOT / "tools" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["browser"] = module
    spec.loader.exec_module(module)
    return module


TOOL = _tool()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOOL.installed() is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with TOOL.Browser() as window:
        yield window


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of every example."""
    folder, made = tmp_path_factory.mktemp("pages"), {}
    for example in sorted((ROOT / "examples").glob("*.yaml")):
        workload = Workload(**yaml.safe_load(example.read_text()))
        answer = recommend(workload)
        report = {
            "recommendation": answer.model_dump(mode="json"),
            "pictures": gather(workload, answer),
            "versions": {"archcompass": "0"},
        }
        made[example.stem] = folder / f"{example.stem}.html"
        made[example.stem].write_text(page(report, "archcompass advise"))
    return made


@pytest.fixture(scope="module")
def one(pages: dict[str, Path]) -> Path:
    return pages["corporate-archive"]


SPOKEN = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "examples").glob("*.yaml"))])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_example_is_drawn_and_asks_nobody(name: str, width: int, pages: dict[str, Path], browser: Any) -> None:
    browser.open(pages[name], width=width)
    assert browser.run("document.querySelectorAll('.plot-container').length") == 6
    assert not [event for event in browser.events if event[0] in SPOKEN]
    asked = {event[1]["request"]["url"] for event in browser.events if event[0] == "Network.requestWillBeSent"}
    assert not [url for url in asked if url.startswith("http")]
    assert browser.run("document.documentElement.scrollWidth") <= width, "wider than the window"
    cut = "[...document.querySelectorAll('.gtitle')].filter((t) => t.getBoundingClientRect().left < 10).length"
    assert browser.run(cut) == 0, "a title is cut off"


CONTRASTS = """
(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.length && (found.length < 4 || found[3] === 1)) return found;
    }
    return [255, 255, 255];
  };
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  const low = [];
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const at = walk.currentNode.parentElement;
    const painted = at.closest("svg.main-svg") && at.closest("g.heatmaplayer, g.scatterlayer");
    if (!walk.currentNode.textContent.trim() || at.closest("style, script, title") || painted) continue;
    const style = getComputedStyle(at);
    const ink = parse(at.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(at.closest("svg") ? at.closest("svg").parentElement : at))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([ratio.toFixed(2), walk.currentNode.textContent.trim().slice(0, 40)]);
  }
  return low;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(dark: bool, one: Path, browser: Any) -> None:
    """WCAG 2.2, 1.4.3 (AA): 4.5 to 1 for every text, of charts as well, whatever its size."""
    browser.open(one, dark=dark)
    assert browser.run(CONTRASTS) == []


def test_every_picture_says_what_it_shows_and_is_there_as_a_table(one: Path, browser: Any) -> None:
    browser.open(one)
    silent = "[...document.querySelectorAll('main [role=img], main svg:not(.main-svg)')]"
    assert browser.run(f"{silent}.filter((e) => !e.closest('.chart > *') && !e.getAttribute('aria-label')).length") == 0
    tables = "[...document.querySelectorAll('figure')].map((f) => f.querySelectorAll('table tr').length)"
    assert len(browser.run(tables)) == 6
    assert min(browser.run(tables)) > 4
    assert browser.run("document.querySelectorAll('th:not([scope])').length") == 0


def test_the_colours_of_layers_are_none_of_a_familys(one: Path, browser: Any) -> None:
    for dark in (False, True):
        browser.open(one, dark=dark)
        colours = browser.run(
            "(() => { const s = getComputedStyle(document.documentElement); const get = (n) => s.getPropertyValue('--' + n); "
            "return [['transformer','moe','ssm','hybrid'].map(get), [1,2,3,4,5,6].map((n) => get('layer-' + n))]; })()"
        )
        assert all(colours[0] + colours[1])
        assert not set(colours[0]) & set(colours[1])


def test_the_keyboard_reaches_everything_and_shows_where_it_is(one: Path, browser: Any) -> None:
    """Every source, table and fold gets the focus by Tab, is outlined, and a number then says its source in the open."""
    browser.open(one)
    reached = set()
    for _ in range(200):
        browser.press("Tab")
        if browser.run("document.activeElement === document.body"):
            break  # round the end
        reached.add(browser.run("document.activeElement.tagName + '.' + document.activeElement.className"))
        outlined = "getComputedStyle(document.activeElement).outlineStyle"
        assert browser.run(outlined) != "none", browser.run("document.activeElement.outerHTML.slice(0, 200)")
        if browser.run("document.activeElement.tagName") == "ABBR":
            said = browser.run("getComputedStyle(document.activeElement, '::after').content")
            assert len(said) > 8, "the source is shown"
    assert {"ABBR.", "SUMMARY.", "DIV.scroll"} <= reached


def test_hovering_tells_and_a_click_on_a_name_hides_its_line(one: Path, browser: Any) -> None:
    browser.open(one)
    browser.run("document.getElementById('decode').scrollIntoView({block: 'center'})")
    middle = "(() => { const r = %s.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    browser.move(*browser.run(middle % "document.querySelector('#decode .scatterlayer .points path')"))
    wait = (
        "new Promise((done) => setTimeout(() => done(document.querySelector('#decode .hoverlayer').textContent), 600))"
    )
    assert "ms" in browser.run(wait)
    browser.click(*browser.run(middle % "document.querySelector('#decode .legendtoggle')"))
    hidden = "new Promise((done) => setTimeout(() => done(document.getElementById('decode').data.map((t) => t.visible)), 800))"
    assert "legendonly" in browser.run(hidden)


def test_every_example_prints_whole(pages: dict[str, Path], browser: Any) -> None:
    """On A4: after `beforeprint`, in the print style, nothing is wider or taller than its place."""
    sheet = 718
    for path in pages.values():
        browser.open(path, dark=True)
        sections = browser.run("[...document.querySelectorAll('h2')].map((h) => h.textContent)")
        printed = base64.b64decode(browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
        assert 8 <= printed.count(b"/Type /Page\n") <= 16, "sheets"
        browser.open(path, dark=True, width=sheet)
        browser.run("dispatchEvent(new Event('beforeprint'))")
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert browser.run("document.documentElement.scrollWidth") <= sheet
        assert browser.run("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == sections
        assert browser.run("[...document.querySelectorAll('h2')].every((h) => h.getClientRects().length)")
        cut = "[...document.querySelectorAll('.chart')].filter((c) => c.scrollHeight > c.offsetHeight).map((c) => c.id)"
        assert browser.run(cut) == []


def test_paper_is_light_narrow_and_unfolded_and_the_screen_comes_back(one: Path, browser: Any) -> None:
    browser.open(one, dark=True)
    before = browser.run("getComputedStyle(document.documentElement).getPropertyValue('--paper')")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("getComputedStyle(document.documentElement).getPropertyValue('--paper')") == "#ffffff"
    assert browser.run("document.querySelectorAll('section > details:not([open])').length") == 0
    assert browser.run("Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.clientWidth))") < 730
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("getComputedStyle(document.documentElement).getPropertyValue('--paper')") == before
    assert browser.run("document.querySelectorAll('section > details[open]').length") == 0
