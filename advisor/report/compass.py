"""The compass rose: four rules as needles, their length the rule's strength. An inline SVG with a text alternative."""

from __future__ import annotations

from html import escape
from math import cos, pi, sin
from typing import Any

DIRECTIONS = {"maximum-quality": -90, "bottomless-knowledge": 0, "infinite-memory": 90, "hybrids": 180}
"""Degrees of each needle, clockwise from the east."""

RADIUS = 118

CENTRE = 170


def rose(rules: list[dict[str, Any]]) -> str:
    """The picture, 340 units square."""
    told = "; ".join(f"{rule['rule'].replace('-', ' ')} {rule['strength']:.2f}" for rule in rules)
    rings = "".join(
        f'<circle cx="{CENTRE}" cy="{CENTRE}" r="{RADIUS * share:.0f}" fill="none" stroke="var(--line)"/>'
        for share in (0.25, 0.5, 0.75, 1.0)
    )
    needles = "".join(_needle(rule) for rule in rules)
    return (
        f'<svg viewBox="0 0 340 340" role="img" aria-label="Strength of the four rules: {escape(told)}" width="100%">'
        f"<title>Strength of the four rules</title>{rings}{needles}"
        f'<circle cx="{CENTRE}" cy="{CENTRE}" r="5" fill="var(--ink)"/></svg>'
    )


def _needle(rule: dict[str, Any]) -> str:
    """A kite from the centre to the rule's strength, its name and figure outside the ring."""
    angle = DIRECTIONS[rule["rule"]] * pi / 180
    length = max(RADIUS * rule["strength"], 6)
    tip = _at(angle, length)
    sides = [_at(angle + turn, min(11, length / 2)) for turn in (pi / 2, -pi / 2)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (sides[0], tip, sides[1]))
    x, y = _at(angle, RADIUS + 24)
    family = escape(rule["family"])
    anchor = {0: "end", 180: "start"}.get(DIRECTIONS[rule["rule"]], "middle")
    x = {0: 338.0, 180: 2.0}.get(DIRECTIONS[rule["rule"]], x)
    y = CENTRE - 24 if DIRECTIONS[rule["rule"]] in (0, 180) else y
    *above, last = escape(rule["rule"].replace("-", " ")).split()
    lines = "".join(f'<tspan x="{x:.0f}" dy="-15">{word}</tspan><tspan x="{x:.0f}" dy="15">' for word in above)
    return (
        f'<g class="{family}"><polygon points="{points}" fill="currentColor"/>'
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="12" font-weight="600" fill="currentColor" '
        f'stroke="var(--paper)" stroke-width="4" paint-order="stroke">{lines or "<tspan>"}{last}'
        f'<tspan font-weight="400"> {rule["strength"]:.2f}</tspan></tspan></text></g>'
    )


def _at(angle: float, distance: float) -> tuple[float, float]:
    return CENTRE + distance * cos(angle), CENTRE + distance * sin(angle)
