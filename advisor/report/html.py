"""The report as one self-contained HTML file: no network, opens from disk, readable on a phone, on paper, light and dark.

Everything the user or a file named is escaped; the page's own policy forbids it to load anything from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from importlib.resources import files
from typing import Any

from archcompass.advisor import units
from archcompass.advisor.report import alternatives, facts, figures
from archcompass.advisor.report.compass import rose
from archcompass.advisor.report.tables import flatten, shown

Data = dict[str, Any]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


CALLED = {
    "transformer": "attention in every layer, all weights active",
    "moe": "mixture of experts: attention, few of many experts active",
    "ssm": "state space model: a state of fixed size, no attention",
    "hybrid": "recurrent layers with attention among them",
}
"""What the families' short names stand for."""

TINTS = 6
"""Colours of layers in page.css; none is a family's."""

SHOWN = ("It would flip to", "Price you pay", "Open models near")
"""Lines of the terminal's report that have a place of their own on the page."""


def page(report: Data, command: str, folder: str = ".") -> str:
    """The file's text.

    Args:
        report: the content of report.json: recommendation, pictures, versions, and after `advise` the profile.
        command: what repeats it.
        folder: where the files beside it lie, as seen from where that is typed.
    """
    answer, profile = report["recommendation"], report.get("profile")
    charts = _charts(answer, report["pictures"], profile)
    body = [
        _opening(answer),
        _compass(answer),
        _cards(answer, profile),
        _section("What each family would hold", _memory(answer)),
        _sweeps(report["pictures"]["comparison"]),
        _section("What the pick is made of", _layers(report["pictures"]["layers"], answer)),
        _section("Where its time goes", _roofline(report["pictures"]["roofline"])),
        _section("If your workload were another", _map(report["pictures"]["map"]) + _flips(answer)),
        _section("Open models near", _published(answer)),
        _section("What else to know", _notes(answer, profile, folder)),
        _section("Why: the arithmetic of the rules", _rules(answer)),
        _section("Every number", _numbers(answer, profile)),
        _section("Repeat it", _repeat(report, command)),
    ]
    return document(facts.sentence(answer), "\n".join(body), charts)


def document(title: str, body: str, charts: Data) -> str:
    """A whole page around `body`, whose charts are drawn by name."""
    data = json.dumps(charts, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><link rel=icon href='data:,'><style>{_asset('page.css')}</style></head>"
        f'<body><main>{body}</main><script id="figures" type="application/json">{data}</script>'
        f"<script>{_plotly()}</script><script>{_asset('page.js')}</script></body></html>\n"
    )


def _charts(answer: Data, pictures: Data, profile: Data | None) -> Data:
    ranges = next((c["speed"]["range"] for c in answer["candidates"] if c["speed"]), None)
    spread = {phase: (f["low"], f["high"]) for phase, f in ranges.items()} if ranges else {}
    comparison = pictures["comparison"]
    prefill, decode = spread.get("prefill", (1.0, 1.0)), spread.get("decode", (1.0, 1.0))
    one = (1.0, 1.0)
    card = answer["hardware"]["total_memory_bytes"]
    return {
        "memory": figures.memory(answer),
        "prefill": figures.sweep(
            comparison, "prefill_ms", "Time to read the prompts", 1e-3, "seconds", prefill, profile
        ),
        "decode": figures.sweep(comparison, "decode_ms_per_token", "Time per token", 1.0, "ms", decode, profile),
        "grows": figures.sweep(comparison, "memory_bytes", "Memory over context", 1e-9, "GB", one, profile, card),
        "map": figures.decision_map(pictures["map"]),
        "roofline": figures.roofline(pictures["roofline"]),
    }


def _opening(answer: Data) -> str:
    family = answer["family"]
    sentence = escape(facts.sentence(answer))
    word = sentence.split(" ·")[0]
    doubts = "".join(f" · {escape(doubt)}" for doubt in answer["doubts"])
    return (
        f'<h1><span class="family {escape(family)}">{word}</span>{sentence.removeprefix(word)}</h1>'
        f"<p class=says>{escape(answer['candidates'][0]['why'][0])}.</p>"
        f"<p class=dim>Confidence {answer['confidence']:.2f} of 1{doubts}</p>"
        f"<p class=dim>Asked: {escape(facts.asked(answer))}</p>"
    )


def _compass(answer: Data) -> str:
    items = "".join(
        f'<li class="{escape(rule["family"])}"><b>{escape(rule["rule"].replace("-", " "))} {rule["strength"]:.2f}</b>'
        f'<div class=bar><span style="width:{100 * rule["strength"]:.0f}%"></span></div>'
        f'<span class=says style="color:var(--ink)">{escape(rule["reason"])}</span></li>'
        for rule in sorted(answer["rules"], key=lambda rule: -rule["strength"])
    )
    vetoes = "".join(f"<li><b>{escape(v['family'])} is out</b>: {escape(v['reason'])}</li>" for v in answer["vetoes"])
    told = "<p class=dim>How loudly each rule speaks for its family, from 0 to 1 (the outer ring).</p>"
    return (
        f"<h2>The compass</h2>{told}<div class=split>{rose(answer['rules'])}<ul class=rules>{items}{vetoes}</ul></div>"
    )


def _cards(answer: Data, profile: Data | None) -> str:
    cards = "".join(_card(candidate, profile if candidate["rank"] == 1 else None) for candidate in answer["candidates"])
    return f"<h2>Four families on {escape(answer['hardware']['name'])}</h2><div class=cards>{cards}</div>"


def _card(candidate: Data, profile: Data | None) -> str:
    rows = {
        "model": escape(candidate["name"]),
        "size": escape(facts.size(candidate)),
        "weights in": escape(candidate["precision"]),
        "memory": _told(units.say_bytes(candidate["memory"]["total_bytes"]), "memory ledger, all cards"),
        "first token": _told(facts.prefill(candidate["speed"]), _source(candidate)),
        "per user": _told(facts.decode(candidate["speed"]), _source(candidate)),
        "fits": escape(facts.verdict(candidate)),
    }
    if profile is not None:
        rows["measured"] = _measured(profile)
    cells = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())
    prices = "".join(f"<li>{escape(price)}</li>" for price in candidate["price"])
    family = escape(candidate["family"])
    head = f"<h3>{candidate['rank']}. {family}</h3><p class=dim>{CALLED[candidate['family']]}</p>"
    return f'<div class="card {family}">{head}<dl>{cells}</dl><ul>{prices}</ul></div>'


def _measured(profile: Data) -> str:
    """What a run on the machine at hand took, over what was predicted for that run: no word about the card."""
    entry: Data = next((entry for entry in profile["profiles"] if entry["ratio"]), {})
    ratios = ", ".join(f"{phase} {facts.times(ratio)}" for phase, ratio in entry.get("ratio", {}).items())
    if not ratios:
        return "-"
    where = "this machine" if entry["hardware"] == profile["hardware"] else f"a {entry['hardware']}, not the card"
    return _told(f"on {where}: {ratios} the prediction", "measured over predicted for the same run on the same machine")


def _memory(answer: Data) -> str:
    used = [(label, shade) for key, (label, shade) in figures.MEMORY_PARTS.items() if _any(answer, key)]
    key = "".join(
        f'<span><i class=key style="background:var(--ink);opacity:{shade}"></i>{label}</span>' for label, shade in used
    )
    line = f"The dashed line is what {escape(answer['hardware']['name'])} holds."
    drawn = chart("memory", "Stacked bars of memory by family against the card's line", alternatives.memory(answer))
    return f"<p class=keys>From the ground up: {key}</p><p class=dim>{line}</p>{drawn}"


def _any(answer: Data, key: str) -> bool:
    return any(candidate["memory"][key] for candidate in answer["candidates"])


def _sweeps(comparison: Data) -> str:
    reading, token, grows = (
        chart(name, f"{alternative} over context, by family", alternatives.sweep(comparison, key, say))
        for name, alternative, key, say in (
            ("prefill", "Time to read the prompts", "prefill_ms", units.say_ms),
            ("decode", "Time per token", "decode_ms_per_token", units.say_ms),
            ("grows", "Memory", "memory_bytes", units.say_bytes),
        )
    )
    text = (
        "<p class=dim>Attention's work grows with the square of the context, and its cache with the context; a fixed state "
        "does not grow. Lines are predictions with their range; crosses were measured; where a line ends, the model no "
        "longer fits. A click on a name hides its line.</p>"
    )
    return _section(
        "The tyranny of the square: as the context grows", f"{text}<div class=two>{reading}{token}</div>{grows}"
    )


def _roofline(found: Data) -> str:
    text = (
        "<p class=dim>Each mark is one operation, as large as its share of the time. Left of the bend one "
        f"{escape(found['card'])} waits for memory, right of it for arithmetic.</p>"
    )
    return text + chart("roofline", "Operations under the roofs of the card", alternatives.roofline(found))


def _map(found: Data) -> str:
    key = "".join(
        f'<span><i class=key style="background:var(--{family})"></i>{letter}: {family}</span>'
        for family, letter in figures.LETTERS.items()
    )
    alternative = f"Which family comes first over {found['across']} and {found['down']}"
    return f"<p class=keys>{key}</p>" + chart("map", alternative, alternatives.decision_map(found))


def _layers(layers: list[list[Data]], answer: Data) -> str:
    """Every layer as a column of its sublayers, one period of the pattern beside the next, and a key."""
    names = list(dict.fromkeys(part["name"] for layer in layers for part in layer))
    tints = {name: f"var(--layer-{index % TINTS + 1})" for index, name in enumerate(names)}
    letters = {name: name[:1].upper() for name in names}
    columns = [
        '<div class=layer title="{}">{}</div>'.format(
            escape(f"layer {depth}: " + ", ".join(part["label"] for part in layer)),
            "".join(
                f'<i style="background:{tints[part["name"]]}">{escape(letters[part["name"]])}</i>' for part in layer
            ),
        )
        for depth, layer in enumerate(layers, 1)
    ]
    period = _period(layers)
    groups = "".join(
        f"<div class=group>{''.join(columns[at : at + period])}</div>" for at in range(0, len(layers), period)
    )
    labels = {part["name"]: part["label"] for layer in layers for part in layer}
    key = "".join(
        f'<span><i class=key style="background:{tints[name]}"></i>{escape(letters[name])}: {escape(labels[name])}</span>'
        for name in names
    )
    told = escape(f"{len(layers)} layers, from the input at the left: {answer['candidates'][0]['model']['layers']}")
    stack = f'<div class=stack role=img aria-label="{told}">{groups}</div>'
    return f"{stack}<p class=keys>{key}</p><p class=dim>Each column is a layer. {told}</p>"


def _period(layers: list[list[Data]]) -> int:
    """After how many layers the pattern repeats; 1 where it does not."""
    return next((p for p in range(1, len(layers) // 2 + 1) if layers[p:] == layers[:-p]), 1)


def _flips(answer: Data) -> str:
    items = "".join(
        f'<li><b class="{escape(f["family"])}">{escape(f["family"])}</b>, {escape(f["change"])}</li>'
        for f in answer["flips"]
    )
    return f"<p>The smallest changes that change the family:</p><ul>{items}</ul>" if items else ""


def _published(answer: Data) -> str:
    if not answer["published"]:
        return "<p class=dim>None of the published models was looked at.</p>"
    columns: dict[str, Callable[[Data], str]] = {
        "model": lambda m: _told(m["name"], m["source"]),
        "family": lambda m: escape(m["family"]),
        "fits": lambda m: f"{'yes' if m['fits'] else 'no'}, {escape(m['precision'])}",
        "memory": lambda m: _told(units.say_bytes(m["memory_bytes"]), "memory ledger"),
        "why": lambda m: escape(m["why"]),
        "licence": lambda m: escape(m["licence"] or "not known"),
    }
    rows = "".join(
        f"<tr>{''.join(f'<td data-of={name}>{say(m)}</td>' for name, say in columns.items())}</tr>"
        for m in answer["published"]
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    table = _scroll("open models near", f"<tr>{head}</tr>{rows}")
    return f"<p>Most users should download, not train.</p><div class=rows>{table}</div>"


def _notes(answer: Data, profile: Data | None, folder: str) -> str:
    rows = "".join(
        f"<tr><td class=dim>{escape(label)}</td><td>{escape(text)}</td></tr>"
        for label, text in facts.lines(answer, profile, folder)
        if text and label not in SHOWN
    )
    return _scroll("what else to know", rows)


def _rules(answer: Data) -> str:
    return "".join(_rule(rule) for rule in sorted(answer["rules"], key=lambda rule: -rule["strength"]))


def _rule(rule: Data) -> str:
    terms = "".join(
        f"<tr><td>{escape(t['name'])}</td><td class=n>{t['value']:.3f}</td><td>{escape(t['function'])}</td>"
        f"<td>{escape(t['input'])}</td><td class=dim>{escape(t['source'])}</td></tr>"
        for t in rule["terms"]
    )
    evidence = "".join(
        f"<li><b>{escape(e['effect'])}</b> ({escape(e['grade'])}): {escape(e['claim'])}: {escape(e['number'])} "
        f"<span class=dim>{escape(e['source'])}</span></li>"
        for e in rule["evidence"]
    )
    head = f"{escape(rule['rule'].replace('-', ' '))} = {escape(rule['formula'])} = {rule['strength']:.2f}"
    return f"<details><summary>{head}</summary>{_scroll('terms of the rule', terms)}<ul>{evidence}</ul></details>"


def _numbers(answer: Data, profile: Data | None) -> str:
    """Every figure of every candidate with its source; what was measured; what was worked out first."""
    rows = []
    for candidate in answer["candidates"]:
        for group, source in (
            ("parameters", "counted from the blocks"),
            ("memory", "memory ledger"),
            ("speed", _source(candidate)),
        ):
            rows += [
                (f"{candidate['family']} {key}", shown(key, value), source)
                for key, value in flatten({group: candidate[group] or {}}).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ]
    rows += [(q["name"], q["text"], q["source"]) for q in answer["derived"]]
    for entry in profile["profiles"] if profile else []:
        facts_of = {key: entry[key] for key in ("memory", "prefill", "decode", "ratio") if entry[key]}
        rows += [
            (f"{entry['source']} on {entry['hardware']}: {key}", shown(key, value), entry["source"])
            for key, value in flatten(facts_of).items()
            if isinstance(value, int | float)
        ]
    cells = "".join(
        f"<tr><td>{escape(a)}</td><td>{escape(b)}</td><td class=dim>{escape(c)}</td></tr>" for a, b, c in rows
    )
    table = _scroll("every number", cells)
    return f"<details><summary>{len(rows)} numbers with their sources</summary>{table}</details>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def chart(name: str, alternative: str, table: alternatives.Table | None = None) -> str:
    """The place of a figure, and what to say where it cannot be seen: a sentence, and the same as a table."""
    drawn = f'<div class=chart id="{name}" role="img" aria-label="{escape(alternative)}"></div>'
    if table is None:
        return f"<figure>{drawn}</figure>"
    head, *rows = table
    cells = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    cells = f"<tr>{cells}</tr>" + "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    folded = f"<details><summary>The same as a table</summary>{_scroll(alternative, cells)}</details>"
    return f"<figure>{drawn}{folded}</figure>"


def _scroll(label: str, rows: str) -> str:
    """A table that may be wider than the page, within reach of the keyboard."""
    return f'<div class=scroll tabindex=0 role=region aria-label="{escape(label)}"><table>{rows}</table></div>'


def _told(text: str, source: str) -> str:
    """A number that says on hover where it comes from."""
    return f'<abbr title="{escape(source)}" tabindex=0>{escape(text)}</abbr>'


def _source(candidate: Data) -> str:
    return f"{candidate['speed']['source']}, with its range" if candidate["speed"] else "not predicted: it does not fit"


def _repeat(report: Data, command: str) -> str:
    """The command, the workload it reads as YAML (of which JSON is a part), and the versions."""
    asked = report["recommendation"]["workload"]
    given = {key: value for key, value in asked.items() if key not in report["recommendation"]["defaults"]}
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items()) or "archcompass: 1"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"<pre>{escape(command)}</pre><p>where workload.yaml holds</p><pre>{escape(yaml)}</pre>"
        f"<p class=dim>{escape(versions)}</p>"
    )


def _asset(name: str) -> str:
    return files("archcompass.advisor.report").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js as the plotly package ships it (MIT), without importing the package."""
    return (
        files("plotly")
        .joinpath("package_data/plotly.min.js")
        .read_text(encoding="utf-8")
        .replace("</script", "<\\/script")
    )
