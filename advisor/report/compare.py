"""The families side by side over a sweep: one table a question, the cheapest marked, then the crossings; or as a picture."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from archcompass.advisor import units
from archcompass.advisor.cli.output import print_lines
from archcompass.advisor.report.layout import Cell, styled, table, width, wrap, write
from archcompass.advisor.report.tables import markdown_lines

QUESTIONS = (
    ("memory_bytes", "Memory", units.say_bytes),
    ("prefill_ms", "Time to read the prompt", units.say_ms),
    ("decode_ms_per_token", "Time per token", units.say_ms),
)


def show(data: dict[str, Any], *, markdown: bool = False) -> None:
    """Prints a comparison (its JSON data) on stdout."""
    families = list(data["models"])
    if markdown:
        return _as_markdown(data, families)
    room = width()
    title = f"One card, four families: {data['hardware']}"
    write([f" {styled(Cell(title, bold=True))}", *_indented(_models(data), room)])
    for key, question, say in QUESTIONS:
        write(["", f" {styled(Cell(question, bold=True))}", *_table(data, families, key, say)])
    write(["", *(line for text in crossing_lines(data) for line in _indented(text.strip(), room)), ""])
    write(_indented(f"{numbers(data)} A dash or brackets: does not fit; * is the cheapest that does.", room))
    return None


def _indented(text: str, room: int) -> list[str]:
    """A sentence whose further lines stand in."""
    first, *more = wrap(text, room - 3)
    return [f" {first}", *(f"   {line}" for line in more)]


def _table(data: dict[str, Any], families: list[str], key: str, say: Any) -> list[str]:
    rows = grid(data, families, key, say)
    lines = table([data["sweep"], *families], rows, right=range(len(families) + 1), gap=3)
    return [f" {line}" for line in lines]


def grid(data: dict[str, Any], families: list[str], key: str, say: Any) -> list[list[str]]:
    """A row per place of the sweep: the place, then each family."""
    rows = []
    places = list(dict.fromkeys(point[data["sweep"]] for point in data["points"]))
    for place in places:
        here = {point["family"]: point for point in data["points"] if point[data["sweep"]] == place}
        fitting = {family: here[family][key] for family in families if here[family]["fits"] and here[family][key]}
        best = min(fitting, key=lambda family: fitting[family]) if fitting else None
        cells = [
            _cell(here[family], key, say) + _seen(data, here[family], key, say) + (" *" if family == best else "  ")
            for family in families
        ]
        rows.append([units.say_tokens(place), *cells])
    return rows


def crossing_lines(data: dict[str, Any]) -> list[str]:
    """One line a crossing: where, who overtakes whom, and why."""
    names = {key: title.lower() for key, title, _ in QUESTIONS}
    unit = " tokens" if data["sweep"] == "context" else " sequences"
    found = [("", cross) for cross in data["crossovers"]] + [
        (" measured", cross) for cross in data["measured_crossovers"]
    ]
    return [
        f"{said} above {units.say_tokens(round(cross['at'], -2) if cross['at'] > 1000 else round(cross['at']))}{unit}: "
        f"{cross['cheaper']} needs less {names[cross['metric']]} than {cross['dearer']} ({cross['cause']})"
        for said, cross in found
    ] or [" No two families change places within this sweep."]


def _cell(point: dict[str, Any], key: str, say: Any) -> str:
    value = point[key]
    if value is None:
        return "-"
    return str(say(value)) if point["fits"] else f"({say(value)})"


def numbers(data: dict[str, Any]) -> str:
    """Where the numbers come from, and where the truth should lie."""
    sources = ", ".join(sorted({point["source"] for point in data["points"]}))
    (fast, slow), (quick, tardy) = data["range"]["prefill"], data["range"]["decode"]
    said = f"Numbers: {sources}; the truth should lie at {fast:g} to {slow:g} times the time to read, "
    said += f"{quick:g} to {tardy:g} times the time per token."
    if data["measured"]:
        said += " After the slash: measured on this machine, as far as the time went."
    return " ".join([said, *(f"{note[0].upper()}{note[1:]}." for note in data["notes"])])


def page(data: dict[str, Any]) -> str:
    """The picture as one HTML file: a line a family for each question, measured points over it."""
    from archcompass.advisor.report import figures, html

    card = None if data["measured"] else data["capacity_bytes"]  # small models beside it would be one line on the axis
    prefill, decode = data["range"]["prefill"], data["range"]["decode"]
    charts = {
        "square": figures.sweep(
            _per_token(data), "prefill_ms", "Time to read one token of a prompt", 1e3, "µs", prefill, None
        ),
        "prefill": figures.sweep(data, "prefill_ms", "Time to read the prompts", 1e-3, "seconds", prefill, None),
        "decode": figures.sweep(data, "decode_ms_per_token", "Time per token", 1.0, "ms", decode, None),
        "grows": figures.sweep(data, "memory_bytes", "Memory", 1e-9, "GB", (1.0, 1.0), None, card),
    }
    title = f"Four families on {data['hardware']}"
    crossings = "".join(f"<li>{escape(line.strip())}</li>" for line in crossing_lines(data))
    drawn = "".join(
        html.chart(name, f"{figure['layout']['title']['text']} by family") for name, figure in charts.items()
    )
    marks = "Lines are predicted, bands their range" + ("; crosses were measured." if data["measured"] else ".")
    told = f"<p class=dim>{escape(numbers(data))} {marks} {escape(_models(data))}</p>"
    return html.document(title, f"<h1>{escape(title)}</h1>{told}{drawn}<ul>{crossings}</ul>", charts)


def _per_token(data: dict[str, Any]) -> dict[str, Any]:
    """The comparison with the time to read shared out among the tokens that are read: level where the cost is linear, rising
    where it grows with the square."""

    def shared(point: dict[str, Any]) -> dict[str, Any]:
        spent = point["prefill_ms"]
        return point | {"prefill_ms": spent and spent / (point["context"] * point["batch"])}

    return data | {kind: [shared(point) for point in data[kind]] for kind in ("points", "measured")}


def write_page(data: dict[str, Any], path: Path) -> None:
    """Writes the picture, whole or not at all.

    Raises:
        FileFormatError: it cannot be written.
    """
    from archcompass.blocks.model.files import write_text

    write_text(path, page(data))


def _seen(data: dict[str, Any], point: dict[str, Any], key: str, say: Any) -> str:
    """What was measured at this place, after a slash; empty where nothing was to be measured at all."""
    if not data["measured"]:
        return ""
    place = (point["family"], point["context"], point["batch"])
    found = next((p for p in data["measured"] if (p["family"], p["context"], p["batch"]) == place), None)
    return f" / {say(found[key])}" if found and found[key] else " / -"


def _models(data: dict[str, Any]) -> str:
    parts = [
        f"{family} {units.say_figures(facts['total'])} {facts['precision']}" for family, facts in data["models"].items()
    ]
    return "  ·  ".join(parts)


def _as_markdown(data: dict[str, Any], families: list[str]) -> None:
    lines = [f"**One card, four families: {data['hardware']}** {_models(data)}"]
    for key, title, say in QUESTIONS:
        lines += ["", f"{title}:", "", *markdown_lines([data["sweep"], *families], grid(data, families, key, say))]
    print_lines([*lines, "", *(f"- {line.strip()}" for line in crossing_lines(data)), "", numbers(data)])
