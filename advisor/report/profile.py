"""A profile in the terminal, or as Markdown: the answer, memory, speed by source, what it rests on."""

from __future__ import annotations

from typing import Any

from archcompass.advisor import units
from archcompass.advisor.cli.output import print_lines
from archcompass.advisor.report.layout import Cell, Column, row, table, width, write
from archcompass.advisor.report.tables import markdown_lines

BAR = 24


def show(data: dict[str, Any], *, markdown: bool = False) -> None:
    """Prints a profile report (its JSON data) on stdout."""
    if markdown:
        table_lines = markdown_lines(headings(data)[1:], [row[1:] for row in rows(data)])
        lines = [f"**{headline(data)}**", "", *table_lines]
        print_lines(lines)
        return
    room = width()
    said = [(entry["source"], note) for entry in data["profiles"] for note in notes(entry)]
    write(row([Cell(""), Cell(headline(data), bold=True)], [Column(1), Column(room - 1)]))
    write(["", *memory_lines(data["profiles"][0]), ""])
    write(table(headings(data), rows(data), right=(3, 4, 5, 6)))
    said += [("Room", room_left(data)), ("Check", data["check"])]
    said += [("not checked", ", ".join(data["unchecked"]))] if data["unchecked"] else []
    write(["", *(line for label, text in said for line in _labelled(label, text, room))])


def _labelled(label: str, text: str, room: int) -> list[str]:
    """A sentence wrapped beside its label."""
    return row([Cell(f" {label}", dim=True), Cell(text)], [Column(12, gap=1), Column(room - 13)])


def headings(data: dict[str, Any]) -> list[str]:
    """The columns; in training the time is that of a step."""
    time = "prefill" if data["mode"] == "inference" else "step"
    return ["", "source", "machine", "prompt", "memory", time, "decode/user", "fits"]


def room_left(data: dict[str, Any]) -> str:
    """How far the question could grow on this machine, and how little would hold it."""
    limits = data["limits"]
    longest, most, least = limits["longest_prompt"], limits["largest_batch"], limits["smallest_machine"]
    if longest == 0 and most == 0:
        here = "not even one short prompt fits"
    else:
        long = "prompts of any length" if longest is None else f"prompts up to {longest:,} tokens"
        meant = limits["meant_for"]
        if meant is not None and (longest is None or longest > meant):
            long += f" (the model was made for {meant:,})"
        here = f"{long}, or {most:,} of this length at once" if most else f"{long} would fit"
    return f"{here}; the smallest that holds it: {least}" if least else here


def headline(data: dict[str, Any]) -> str:
    """What was asked of whom, and whether it fits."""
    parameters, first = data["parameters"], data["profiles"][0]
    memory = first["memory"]
    size = f"{units.say_figures(parameters['total'])} total"
    if parameters["active"] < 0.95 * parameters["total"]:
        size += f", {units.say_figures(parameters['active'])} active"
    if not first["fits"]:
        return f"{data['model']} · {size} · {first['precision']} · {first['verdict']}"
    spare = memory["capacity_bytes"] - memory["per_card_bytes"]
    is_beside_a_run = len(data["profiles"]) == 2
    left = "measured here" if is_beside_a_run else f"{units.say_bytes(spare)} to spare"
    if memory["per_card_bytes"] < 0.9 * memory["total_bytes"]:
        left += " on each"
    return f"{data['model']} · {size} · {first['precision']} · fits {first['hardware']}, {left}"


def memory_lines(entry: dict[str, Any]) -> list[str]:
    """The ledger, one bar a line."""
    memory = entry["memory"]
    parts = [
        ("weights", memory["weights_bytes"]),
        ("state", memory["state_bytes"]),
        ("activations", memory["activation_bytes"]),
        ("training", memory["training_bytes"]),
        ("overhead", memory["overhead_bytes"]),
    ]
    whole = max(memory["total_bytes"], 1)
    lines = [
        f" {name:<12}{units.say_bytes(size):>9}  {'#' * round(BAR * size / whole)}" for name, size in parts if size > 0
    ]
    return [*lines, f" {'in all':<12}{units.say_bytes(memory['total_bytes']):>9}"]


def rows(data: dict[str, Any]) -> list[list[str]]:
    """A row per source."""
    return [
        [
            str(number),
            entry["source"],
            entry["hardware"],
            _tokens(entry, data["mode"]),
            units.say_bytes(entry["memory"]["total_bytes"]),
            _prefill(entry),
            _decode(entry),
            "yes" if entry["fits"] else "no",
        ]
        for number, entry in enumerate(data["profiles"], 1)
    ]


def notes(entry: dict[str, Any]) -> list[str]:
    """What an entry rests on: the ratio to its prediction, what was run, and what must be known."""
    lines = []
    if entry["ratio"]:
        told = ", ".join(f"{phase} {ratio:.2f}x" for phase, ratio in entry["ratio"].items())
        lines.append(f"took {told} the predicted time of this very run")
    ran = ", ".join(f"{key} {value}" for key, value in entry["ran"].items() if not isinstance(value, dict | list))
    stated = bool(entry["range"]["prefill_ms"] or entry["range"]["decode_ms_per_token"])
    rests = [f"range: {entry['range']['why']}"] if stated else []
    return [*lines, *([f"ran: {ran}"] if ran else []), *rests, *entry["notes"]]


def _tokens(entry: dict[str, Any], mode: str) -> str:
    read = units.say_tokens(entry["prompt"])
    return f"{read} + {units.say_tokens(entry['generate'])}" if mode == "inference" else read


def _prefill(entry: dict[str, Any]) -> str:
    if entry["prefill"] is None:
        return "-"
    return _with_range(entry["prefill"]["ms"], entry["range"]["prefill_ms"])


def _decode(entry: dict[str, Any]) -> str:
    if entry["decode"] is None:
        return "-"
    bounds = entry["range"]["decode_ms_per_token"]
    text = units.say_rate(entry["decode"]["tokens_per_second_per_user"])
    if bounds is None:
        return text
    slow, fast = (units.say_rate(1e3 / bound, "").strip() for bound in reversed(bounds))
    return f"{text} ({units.say_between(slow, fast)})"


def _with_range(value: float, bounds: list[float] | None) -> str:
    text = units.say_ms(value)
    return text if bounds is None else f"{text} ({units.say_between(*map(units.say_ms, bounds))})"
