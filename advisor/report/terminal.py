"""The answer on one screen: the sentence, why, the four families, what would change it, what to do next.

Reads the JSON data of a recommendation (and of a profile, after `advise`), so that a saved report prints the same again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from archcompass.advisor.cli.output import print_lines
from archcompass.advisor.report import facts
from archcompass.advisor.report.layout import Cell, Column, row, styled, table, width, wrap, write
from archcompass.advisor.report.tables import markdown_lines

Data = dict[str, Any]

LABEL = 18
"""Columns of the words at the left of a line."""

BARS = (18, 10, 4, 0)
"""Characters of a bar of memory: the longest that there is room for."""

LEAST = 12
"""Characters that the last column of the families is left with, where shorter bars can do it."""


def show(
    data: Data,
    *,
    profile: Data | None = None,
    folder: str = "",
    question: str = "",
    markdown: bool = False,
    explain: bool = False,
) -> None:
    """Prints a recommendation on stdout, and beside it what was measured; `folder` and `question` as `facts.lines` has them."""
    said = facts.lines(data, profile, folder, question)
    if markdown:
        print_lines(_markdown(data, profile, said))
        return
    room = width()
    write(_answer(data, room))
    write(_because(data, room))
    write(_families(data, profile, room))
    write(_labelled(said, room))
    if data.get("front"):
        write(_front(data))
    if explain:
        write(_arithmetic(data, room))


def _answer(data: Data, room: int) -> list[str]:
    """The sentence, and how sure it is at the right end of the line or below it."""
    sentence, sure = facts.sentence(data), f"confidence {data['confidence']:.2f}"
    if room - len(sentence) - len(sure) >= 3:
        columns = [Column(1), Column(room - len(sure) - 1), Column(len(sure))]
        first = row([Cell(""), Cell(sentence, bold=True), Cell(sure)], columns)
    else:
        first = row([Cell(""), Cell(sentence, bold=True)], [Column(1), Column(room - 1)])
        first.append(styled(Cell(f" {sure}", dim=True)))
    return [*first, *_indented(data["doubts"], room), ""]


def _because(data: Data, room: int) -> list[str]:
    """A line a rule, the strongest first, with its name and strength at the right."""
    names, strengths = 20, 4
    columns = [
        Column(9, gap=2),
        Column(room - 9 - names - strengths - 6, gap=2),
        Column(names, right=True, gap=2),
        Column(strengths, right=True),
    ]
    said = [
        (rule["reason"], rule["rule"].replace("-", " "), f"{rule['strength']:.2f}")
        for rule in sorted(data["rules"], key=lambda rule: -rule["strength"])
    ]
    said += [(f"{veto['family']} is out: {veto['reason']}", f"veto: {veto['name']}", "") for veto in data["vetoes"]]
    lines = []
    for index, (reason, name, strength) in enumerate(said):
        first = Cell(" Because" if index == 0 else "")
        lines += row([first, Cell(reason), Cell(name, dim=True), Cell(strength)], columns)
    return [*lines, ""]


def _families(data: Data, profile: Data | None, room: int) -> list[str]:
    """The four candidates, best first: with the longest bars that leave the last column room for its words."""
    headings = facts.headings(data, measured=profile is not None)
    gap = 1 if room < 96 else 2
    for bar in BARS:
        rows = facts.rows(data, profile, bar=bar)
        widths = [_width(*cells) for cells in zip(headings, *rows, strict=True)]
        left = room - sum(widths[:-1]) - gap * (len(widths) - 1)
        if left >= LEAST:
            break
    widths[-1] = min(widths[-1], max(left, 1))
    columns = [
        Column(wide, right=index not in (1, 2, 3, len(widths) - 1), gap=gap) for index, wide in enumerate(widths)
    ]
    lines = row([Cell(heading, dim=True) for heading in headings], columns)
    for cells in rows:
        lines += row([Cell(cell, bold=cells[0] == "1") for cell in cells], columns)
    return [*lines, ""]


def _width(heading: str, *cells: str) -> int:
    """Characters that a column takes: its cells stay whole, its heading may wrap between words."""
    return max(map(len, [*heading.split(), *cells]), default=0)


def _labelled(lines: list[tuple[str, str]], room: int) -> list[str]:
    """Labelled sentences, wrapped beside their label."""
    columns = [Column(LABEL, gap=1), Column(room - LABEL - 1)]
    return [
        line
        for label, text in lines
        for line in row([Cell(f" {label}" if label else "", dim=True), Cell(text)], columns)
    ]


def _front(data: Data) -> list[str]:
    """What could be had instead, best quality first."""
    title = styled(Cell(" Could be had instead: no other of these is better, smaller and faster at once", bold=True))
    note = styled(Cell(f" {facts.FRONT_NOTE}", dim=True))
    return ["", title, *table(facts.FRONT, facts.front(data), right=(3, 4, 5)), note]


def _arithmetic(data: Data, room: int) -> list[str]:
    """The derived quantities; then every rule's formula, what went in, what came out, and what it stands on."""
    told = (f"{quantity['name']}: {quantity['text']}   [{quantity['source']}]" for quantity in data["derived"])
    lines = ["", styled(Cell(" Worked out first", bold=True)), *_indented(told, room, dim=False)]
    for rule in sorted(data["rules"], key=lambda rule: -rule["strength"]):
        formula = f" {rule['rule'].replace('-', ' ')} = {rule['formula']} = {rule['strength']:.2f}"
        lines += ["", *row([Cell(formula, bold=True)], [Column(room)])]
        for term in rule["terms"]:
            source = f"   [{term['source']}]" if term["source"] else ""
            text = f"{term['name']} = {term['value']:.3f}   {term['function']}   given {term['input']}{source}"
            lines += _indented([text], room, dim=False)
        lines += _indented(
            (
                f"{item['effect']} ({item['grade']}): {item['claim']}: {item['number']}   [{item['source']}]"
                for item in rule["evidence"]
            ),
            room,
        )
    return lines


def _indented(texts: Iterable[str], room: int, *, dim: bool = True) -> list[str]:
    return [f"   {styled(Cell(line, dim=dim))}" for text in texts for line in wrap(text, room - 3)]


def _markdown(data: Data, profile: Data | None, said: list[tuple[str, str]]) -> list[str]:
    """The same for an issue or a design review."""
    rules = [[rule["rule"], f"{rule['strength']:.2f}", rule["reason"]] for rule in data["rules"]]
    return [
        f"**{facts.sentence(data)}** (confidence {data['confidence']:.2f})",
        "",
        f"Asked: {facts.asked(data)}",
        "",
        *markdown_lines(["rule", "strength", "reason"], rules),
        "",
        *markdown_lines(facts.headings(data, measured=profile is not None), facts.rows(data, profile, bar=0)),
        "",
        *(f"- **{label}**: {text}" if label else f"- {text}" for label, text in said if text),
        *(["", *markdown_lines(facts.FRONT, facts.front(data))] if data.get("front") else []),
    ]
