"""The charts of the HTML report as Plotly figures: plain data, colours by name, so that the page follows its reader's theme."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import Any

from archcompass.advisor import units
from archcompass.advisor.sizing.shapes import FAMILIES

Data = dict[str, Any]

LETTERS = {"transformer": "T", "moe": "M", "ssm": "S", "hybrid": "H"}
"""What stands in the cells of the map, for eyes and printers that do not part the colours."""

MEMORY_PARTS = {
    "weights_bytes": ("weights", 1.0),
    "state_bytes": ("cache and state", 0.65),
    "activation_bytes": ("activations", 0.45),
    "training_bytes": ("training", 0.35),
    "overhead_bytes": ("overhead", 0.25),
}


STEPS = (
    (1.0,),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0),
)
"""Marks within a power of ten, the fewest first."""


def memory(answer: Data) -> Data:
    """Stacked bars against the card's line."""
    candidates = answer["candidates"]
    names = [f"{candidate['family']}<br>{candidate['name'].replace('-', '-<br>')}" for candidate in candidates]
    bars = [
        {
            "type": "bar",
            "name": label,
            "x": names,
            "y": [candidate["memory"][key] / 1e9 for candidate in candidates],
            "marker": {"color": [f"var:{candidate['family']}" for candidate in candidates], "opacity": opacity},
            "hovertemplate": f"{label}: %{{y:.2f}} GB<br>memory ledger<extra></extra>",
        }
        for key, (label, opacity) in MEMORY_PARTS.items()
        if any(candidate["memory"][key] for candidate in candidates)
    ]
    capacity = answer["hardware"]["total_memory_bytes"] / 1e9
    return {
        "data": bars,
        "layout": {
            "barmode": "stack",
            "title": {"text": "Memory, GB"},
            "xaxis": {"tickangle": 0},
            "yaxis": {"title": {"text": "GB"}},
            "shapes": [
                {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": capacity, "y1": capacity,
                 "line": {"color": "var:bad", "width": 2, "dash": "dash"}},
            ],
            "showlegend": False,
        },
    }  # fmt: skip


def sweep(
    comparison: Data,
    key: str,
    title: str,
    scale: float,
    unit: str,
    spread: tuple[float, float],
    profile: Data | None,
    limit: float | None = None,
) -> Data:
    """One line a family over the sweep on logarithmic axes, a band for its range, crossings named, measured points as dots.

    `limit` is drawn across: what the card holds.
    """
    traces: list[Data] = []
    for family in FAMILIES:
        points = [p for p in comparison["points"] if p["family"] == family and p[key]]
        traces += _line(family, points, comparison["sweep"], key, scale, unit, spread)
        seen = [p for p in comparison.get("measured", []) if p["family"] == family and p[key]]
        traces += _seen(family, seen, comparison["sweep"], key, scale, unit)
    crossings = [cross for cross in comparison["crossovers"] if cross["metric"] == key]
    traces += [_crossings(comparison, key, scale, unit), *_dots(profile, key, scale, unit)]
    traces += [] if limit is None else [_limit(comparison, limit * scale, unit)]
    return {
        "data": traces,
        "layout": {
            "title": {"text": title},
            "xaxis": {
                "type": "log",
                "title": {
                    "text": f"{comparison['sweep']}, {'tokens' if comparison['sweep'] == 'context' else 'sequences'}"
                },
                **_powers(comparison),
            },
            "yaxis": {"type": "log", "title": {"text": unit}, **log_ticks(_heights(traces))},
            "annotations": _named(crossings, comparison, key, scale, _heights(traces)),
        },
    }


def decision_map(found: Data) -> Data:
    """Which family comes first over context and breadth, with 'you are here'."""
    order = {family: index for index, family in enumerate(FAMILIES)}
    columns = [units.say_tokens(value) for value in found["columns"]]
    colours = [
        [step, f"var:{family}"] for index, family in enumerate(FAMILIES) for step in (index / 4, (index + 1) / 4)
    ]
    here = found["here"]
    marks = []
    if isinstance(here[found["across"]], int):
        place = min(found["columns"], key=lambda value: abs(value - here[found["across"]]))
        marks.append(
            {"type": "scatter", "mode": "markers+text", "x": [units.say_tokens(place)], "y": [here[found["down"]]],
             "text": ["you"], "textposition": "top center",
             "marker": {"size": 13, "color": "var:paper", "line": {"width": 2, "color": "var:ink"}},
             "textfont": {"color": "var:paper"}, "hoverinfo": "skip", "showlegend": False}
        )  # fmt: skip
    heat = {
        "type": "heatmap",
        "x": columns,
        "y": found["rows"],
        "z": [[order[cell] + 0.5 if cell else None for cell in row] for row in found["cells"]],
        "text": [[LETTERS.get(cell, "-") for cell in row] for row in found["cells"]],
        "texttemplate": "%{text}",
        "textfont": {"color": "var:card"},
        "customdata": [[cell or "nothing fits" for cell in row] for row in found["cells"]],
        "hovertemplate": "%{x} tokens, %{y}: %{customdata}<extra></extra>",
        "colorscale": colours,
        "zmin": 0,
        "zmax": 4,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    }
    axes = {
        "xaxis": {"title": {"text": found["across"]}, "type": "category"},
        "yaxis": {"title": {"text": found["down"]}, "type": "category"},
    }
    return {"data": [heat, *marks], "layout": {"title": {"text": "Which family comes first"}, **axes}}


def roofline(found: Data) -> Data:
    """The card's two roofs, and where each operation of the pick stands under them."""
    bandwidth = found["bandwidth_bytes_per_second"]
    xs = [2**power for power in range(-4, 15)]
    peaks = {peak: dtype for dtype, peak in reversed(found["flops_per_second"].items())}
    roofs = [
        {"type": "scatter", "mode": "lines", "name": f"{dtype} roof", "x": xs,
         "y": [min(peak, bandwidth * x) / 1e12 for x in xs], "hoverinfo": "skip",
         "line": {"color": "var:dim", "dash": "solid" if dtype == "bf16" else "dot"}}
        for peak, dtype in sorted(peaks.items())
    ]  # fmt: skip
    peak = max(peaks)
    marks = []
    for phase, symbol, colour in (("prefill", "circle", "var:layer-3"), ("decode", "diamond", "var:layer-1")):
        here = [point for point in found["points"] if point["phase"] == phase]
        marks.append(
            {"type": "scatter", "mode": "markers", "name": phase, "x": [point["flops_per_byte"] for point in here],
             "y": [min(peak, bandwidth * point["flops_per_byte"]) / 1e12 for point in here],
             "marker": {"symbol": symbol, "color": colour, "size": [8 + 26 * point["share"] for point in here], "opacity": 0.8},
             "text": [_mark(point) for point in here],
             "hovertemplate": "%{text}<br>%{x:.3g} FLOP/byte<extra></extra>"}
        )  # fmt: skip
    return {
        "data": [*roofs, *marks],
        "layout": {
            "title": {"text": "Operations under the roofs of one card"},
            "xaxis": {"type": "log", "title": {"text": "FLOPs per byte"}, **log_ticks(xs)},
            "yaxis": {"type": "log", "title": {"text": "TFLOP/s within reach"}, **log_ticks(_heights(roofs))},
        },
    }


def _mark(point: Data) -> str:
    share = f"{point['share']:.0%} of {point['phase']}"
    return f"{point['name']} ({point['kind']})<br>{share}, bound by {point['bound']}"


def _line(
    family: str, points: list[Data], sweep: str, key: str, scale: float, unit: str, spread: tuple[float, float]
) -> list[Data]:
    if not points:
        return []
    xs, ys = [point[sweep] for point in points], [point[key] * scale for point in points]
    band = {
        "type": "scatter", "mode": "lines", "x": xs + xs[::-1],
        "y": [y * spread[1] for y in ys] + [y * spread[0] for y in ys[::-1]],
        "fill": "toself", "fillcolor": f"var:{family}/22", "line": {"width": 0, "color": f"var:{family}"}, "hoverinfo": "skip",
        "showlegend": False, "legendgroup": family,
    }  # fmt: skip
    line = {
        "type": "scatter", "mode": "lines+markers", "name": family, "x": xs, "y": ys, "legendgroup": family,
        "line": {"color": f"var:{family}", "width": 2}, "marker": {"size": 5},
        "text": [f"{point['source']}{'' if point['fits'] else ', does not fit'}" for point in points],
        "hovertemplate": f"{family}: %{{y:.4g}} {unit}<br>%{{text}}<extra></extra>",
    }  # fmt: skip
    return [band, line] if spread != (1.0, 1.0) else [line]


def _seen(family: str, points: list[Data], sweep: str, key: str, scale: float, unit: str) -> list[Data]:
    """What was measured of one family along the sweep."""
    if not points:
        return []
    return [
        {"type": "scatter", "mode": "markers", "name": f"{family}, measured", "legendgroup": family,
         "x": [point[sweep] for point in points], "y": [point[key] * scale for point in points],
         "marker": {"size": 11, "symbol": "x", "color": f"var:{family}", "line": {"width": 1, "color": "var:ink"}},
         "hovertemplate": f"{family} measured here: %{{y:.4g}} {unit}<extra></extra>"}
    ]  # fmt: skip


def _dots(profile: Data | None, key: str, scale: float, unit: str) -> list[Data]:
    """What was measured on this machine, as dots; only where the machine is the one the lines are about."""
    if profile is None or key == "memory_bytes":
        return []
    dots = []
    for entry in profile["profiles"]:
        part = entry["prefill"] if key == "prefill_ms" else entry["decode"]
        if entry["source"] in ("measured", "sampled") and part and entry["hardware"] == profile["hardware"]:
            value = part["ms"] if key == "prefill_ms" else part["ms_per_token"]
            dots.append(
                {"type": "scatter", "mode": "markers", "name": entry["source"], "x": [entry["prompt"]], "y": [value * scale],
                 "marker": {"size": 12, "symbol": "x", "color": "var:ink"},
                 "hovertemplate": f"{entry['source']} here: %{{y:.4g}} {unit}<extra></extra>"}
            )  # fmt: skip
    return dots


def _limit(comparison: Data, height: float, unit: str) -> Data:
    xs = [point[comparison["sweep"]] for point in comparison["points"]]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "what the card holds",
        "x": [min(xs), max(xs)],
        "y": [height, height],
        "line": {"color": "var:bad", "width": 2, "dash": "dash"},
        "hovertemplate": f"the card holds %{{y:.4g}} {unit}<extra></extra>",
    }


def _crossings(comparison: Data, key: str, scale: float, unit: str) -> Data:
    """Every crossing as a mark that names the two and says why."""
    crossings = [cross for cross in comparison["crossovers"] if cross["metric"] == key]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "crossing",
        "x": [cross["at"] for cross in crossings],
        "y": [_height(cross, comparison, key) * scale for cross in crossings],
        "marker": {"symbol": "circle-open", "size": 13, "color": "var:ink", "line": {"width": 2}},
        "text": [
            f"above {units.say_tokens(round(cross['at']))} {cross['cheaper']} needs less than {cross['dearer']}:<br>"
            f"{cross['cause']}"
            for cross in crossings
        ],
        "hovertemplate": f"%{{text}}<br>%{{y:.3g}} {unit}<extra></extra>",
    }


def _named(crossings: list[Data], comparison: Data, key: str, scale: float, heights: list[float]) -> list[Data]:
    """The first crossing that the square loses, in words above all lines: here a linear family passes a quadratic one."""
    lost = [
        cross
        for cross in crossings
        if cross["dearer"] in ("transformer", "moe") and cross["cheaper"] in ("ssm", "hybrid")
    ]
    xs = [log10(point[comparison["sweep"]]) for point in comparison["points"]]
    above = log10(max(heights)) + 0.1 * log10(max(heights) / min(heights))
    return [
        {
            "x": log10(cross["at"]),
            "y": log10(_height(cross, comparison, key) * scale),
            "text": f"{cross['cheaper']} passes {cross['dearer']}",
            "showarrow": True,
            "arrowhead": 2,
            **_beside(log10(cross["at"]) > (min(xs) + max(xs)) / 2),
            "ayref": "y",
            "ay": above,
            "bgcolor": "var:card/dd",
            "font": {"size": 11, "color": f"var:{cross['cheaper']}"},
            "arrowcolor": f"var:{cross['cheaper']}",
        }
        for cross in lost[:1]
    ]


def _beside(is_right: bool) -> Data:
    """Where a mark's words stand: on the side with more room."""
    return {"ax": -14, "xanchor": "right"} if is_right else {"ax": 14, "xanchor": "left"}


def _height(cross: Data, comparison: Data, key: str) -> float:
    """The value of both families where they cross, between the two places beside it."""
    sweep = comparison["sweep"]
    points = sorted((p[sweep], p[key]) for p in comparison["points"] if p["family"] == cross["cheaper"] and p[key])
    below = max((point for point in points if point[0] <= cross["at"]), default=points[0])
    above = min((point for point in points if point[0] >= cross["at"]), default=points[-1])
    if below[0] == above[0]:
        return float(below[1])
    share = (log10(cross["at"]) - log10(below[0])) / (log10(above[0]) - log10(below[0]))
    return float(10 ** (log10(below[1]) + share * (log10(above[1]) - log10(below[1]))))


def _heights(traces: list[Data]) -> list[float]:
    return [y for trace in traces for y in trace["y"]]


def log_ticks(values: list[float]) -> Data:
    """Marks of a logarithmic axis in full: powers of ten, and more between them until three are seen."""
    if not values:
        return {}
    powers = range(floor(log10(min(values))), ceil(log10(max(values))) + 1)
    for steps in STEPS:
        marks = [step * 10.0**power for power in powers for step in steps]
        if sum(min(values) <= mark <= max(values) for mark in marks) >= 3:
            break
    return {"tickmode": "array", "tickvals": marks, "ticktext": [_mark_text(mark) for mark in marks]}


def _mark_text(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _powers(comparison: Data) -> Data:
    values = list(dict.fromkeys(point[comparison["sweep"]] for point in comparison["points"]))[::2]
    low, high = (log10(end(point[comparison["sweep"]] for point in comparison["points"])) for end in (min, max))
    # A range of its own: words beside a crossing would stretch the axis.
    around = {"range": [low - 0.05 * (high - low), high + 0.05 * (high - low)]} if high > low else {}
    return {
        "tickmode": "array",
        "tickvals": values,
        "ticktext": [units.say_tokens(value) for value in values],
        **around,
    }
