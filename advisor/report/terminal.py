"""The answer on one screen: the sentence, why, the four families, what would change it, what to do next.

Reads the JSON data of a recommendation (and of a profile, after `advise`), so that a saved report prints the same again.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from archcompass.advisor.cli.output import console, print_lines
from archcompass.advisor.report import facts
from archcompass.advisor.report.tables import markdown_lines

Data = dict[str, Any]

LABEL = 18
"""Columns of the words at the left of a line."""


def show(
    data: Data, *, profile: Data | None = None, folder: str | None = None, markdown: bool = False, explain: bool = False
) -> None:
    """Prints a recommendation on stdout, and beside it what was measured; `folder` is where its files were written."""
    if markdown:
        print_lines(_markdown(data, profile, folder))
        return
    out = console()
    _answer(out, data)
    _because(out, data)
    _families(out, data, profile)
    _lines(out, facts.lines(data, profile, folder))
    if explain:
        _arithmetic(out, data)


def _answer(out: Console, data: Data) -> None:
    """The sentence, and how sure it is at the right end of the line or below it."""
    sentence, sure = Text(f" {facts.sentence(data)}", style="bold"), f"confidence {data['confidence']:.2f}"
    room = out.width - len(sentence) - len(sure)
    if room >= 2:
        out.print(Text.assemble(sentence, " " * (room - 1), sure))
    else:
        out.print(sentence)
        out.print(Text(f" {sure}", style="dim"))
    for doubt in data["doubts"]:
        out.print(Text(f"   {doubt}", style="dim"))
    out.print()


def _because(out: Console, data: Data) -> None:
    """A line a rule, the strongest first, with its name and strength at the right."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=9)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(justify="right", width=20, no_wrap=True)
    table.add_column(justify="right", width=4, no_wrap=True)
    table.expand = True
    ordered = sorted(data["rules"], key=lambda rule: -rule["strength"])
    for index, rule in enumerate(ordered):
        name = rule["rule"].replace("-", " ")
        table.add_row(
            " Because" if index == 0 else "", Text(rule["reason"]), Text(name, style="dim"), f"{rule['strength']:.2f}"
        )
    for veto in data["vetoes"]:
        table.add_row(
            "", Text(f"{veto['family']} is out: {veto['reason']}"), Text(f"veto: {veto['name']}", style="dim"), ""
        )
    out.print(table)
    out.print()


def _families(out: Console, data: Data, profile: Data | None) -> None:
    """The four candidates, best first."""
    narrow = out.width < 96
    headings = facts.headings(data, measured=profile is not None)
    table = Table(box=None, pad_edge=True, padding=(0, 1 if narrow else 2, 0, 0), header_style="dim")
    for index, heading in enumerate(headings):
        last = index == len(headings) - 1
        table.add_column(
            heading, justify="left" if index in (1, 2, 3) or last else "right", overflow="fold", no_wrap=not last
        )
    for row in facts.rows(data, profile, bar=10 if narrow or profile else 18):
        table.add_row(*(Text(cell) for cell in row), style="bold" if row[0] == "1" else "")
    out.print(table)
    out.print()


def _lines(out: Console, lines: list[tuple[str, str]]) -> None:
    """Labelled sentences, wrapped beside their label."""
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=LABEL, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for label, text in lines:
        table.add_row(Text(f" {label}", style="dim"), Text(text))
    out.print(table)


def _arithmetic(out: Console, data: Data) -> None:
    """Every rule's formula, what went in, what came out, and what it stands on; then the derived quantities."""
    for rule in sorted(data["rules"], key=lambda rule: -rule["strength"]):
        out.print()
        out.print(Text(f" {rule['rule'].replace('-', ' ')} = {rule['formula']} = {rule['strength']:.2f}", style="bold"))
        for term in rule["terms"]:
            source = f"   [{term['source']}]" if term["source"] else ""
            text = f"{term['name']} = {term['value']:.3f}   {term['function']}   given {term['input']}{source}"
            out.print(Padding(Text(text), (0, 0, 0, 3)))
        for item in rule["evidence"]:
            text = f"{item['effect']} ({item['grade']}): {item['claim']}: {item['number']}   [{item['source']}]"
            out.print(Padding(Text(text, style="dim"), (0, 0, 0, 3)))
    out.print()
    out.print(Text(" Worked out first", style="bold"))
    for quantity in data["derived"]:
        out.print(Padding(Text(f"{quantity['name']}: {quantity['text']}   [{quantity['source']}]"), (0, 0, 0, 3)))


def _markdown(data: Data, profile: Data | None, folder: str | None) -> list[str]:
    """The same for an issue or a design review."""
    rules = [[rule["rule"], f"{rule['strength']:.2f}", rule["reason"]] for rule in data["rules"]]
    return [
        f"**{facts.sentence(data)}** (confidence {data['confidence']:.2f})",
        "",
        *markdown_lines(["rule", "strength", "reason"], rules),
        "",
        *markdown_lines(facts.headings(data, measured=profile is not None), facts.rows(data, profile, bar=0)),
        "",
        *(f"- **{label}**: {text}" for label, text in facts.lines(data, profile, folder) if label),
    ]
