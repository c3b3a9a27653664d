"""The report as one self-contained HTML file: no network, opens from disk, readable on a phone, on paper, light and dark.

Everything the user or a file named is escaped; the page's own policy forbids it to load anything from anywhere.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

from archcompass.advisor.report import facts, figures, units
from archcompass.advisor.report.compass import rose
from archcompass.advisor.report.tables import flatten, shown

Data = dict[str, Any]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def page(report: Data, command: str) -> str:
    """The file's text.

    Args:
        report: the content of report.json: recommendation, pictures, versions, and after `advise` the profile.
        command: what repeats it.
    """
    answer, profile = report["recommendation"], report.get("profile")
    charts = _charts(answer, report["pictures"], profile)
    body = [
        _opening(answer),
        _compass(answer),
        _cards(answer, profile),
        _section(
            "What each family would hold", chart("memory", "Stacked bars of memory by family against the card's line")
        ),
        _sweeps(),
        _section("What the pick is made of", _layers(report["pictures"]["layers"], answer)),
        _section("Where its time goes", chart("roofline", "Operations under the roofs of the card")),
        _section(
            "If your workload were another",
            chart("map", "Which family comes first over context and breadth") + _flips(answer),
        ),
        _section("Open models near", _published(answer)),
        _section("What else to know", _notes(answer, profile)),
        _section("Why: the arithmetic of the rules", _rules(answer)),
        _section("Every number", _numbers(answer, profile)),
        _section("Repeat it", f"<pre>{escape(command)}</pre><p class=dim>{escape(_versions(report))}</p>"),
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
    return {
        "memory": figures.memory(answer),
        "prefill": figures.sweep(
            comparison, "prefill_ms", "Time to read the prompts", 1e-3, "seconds", prefill, profile
        ),
        "decode": figures.sweep(comparison, "decode_ms_per_token", "Time per token", 1.0, "ms", decode, profile),
        "grows": figures.sweep(comparison, "memory_bytes", "Memory over context", 1e-9, "GB", one, profile),
        "map": figures.decision_map(pictures["map"]),
        "roofline": figures.roofline(pictures["roofline"]),
    }


def _opening(answer: Data) -> str:
    family = answer["family"]
    sentence = escape(facts.sentence(answer))
    word = sentence.split(" ·")[0]
    doubts = "; ".join(answer["doubts"])
    return (
        f'<h1><span class="family {escape(family)}">{word}</span>{sentence.removeprefix(word)}</h1>'
        f"<p>{escape(answer['candidates'][0]['why'][0])}.</p>"
        f"<p class=dim>confidence {answer['confidence']:.2f}{': ' + escape(doubts) if doubts else ''}</p>"
    )


def _compass(answer: Data) -> str:
    items = "".join(
        f'<li class="{escape(rule["family"])}"><b>{escape(rule["rule"].replace("-", " "))} {rule["strength"]:.2f}</b>'
        f'<div class=bar><span style="width:{100 * rule["strength"]:.0f}%"></span></div>'
        f'<span style="color:var(--ink)">{escape(rule["reason"])}</span></li>'
        for rule in sorted(answer["rules"], key=lambda rule: -rule["strength"])
    )
    vetoes = "".join(f"<li><b>{escape(v['family'])} is out</b>: {escape(v['reason'])}</li>" for v in answer["vetoes"])
    return f"<h2>The compass</h2><div class=split>{rose(answer['rules'])}<ul class=rules>{items}{vetoes}</ul></div>"


def _cards(answer: Data, profile: Data | None) -> str:
    cards = "".join(_card(candidate, profile if candidate["rank"] == 1 else None) for candidate in answer["candidates"])
    return f"<h2>Four families on {escape(answer['hardware']['name'])}</h2><div class=cards>{cards}</div>"


def _card(candidate: Data, profile: Data | None) -> str:
    rows = {
        "model": escape(candidate["name"]),
        "size": escape(facts.size(candidate)),
        "weights in": escape(candidate["precision"]),
        "memory": _told(units.gb(candidate["memory"]["total_bytes"]), "memory ledger, all cards"),
        "first token": _told(facts.prefill(candidate["speed"]), _source(candidate)),
        "per user": _told(facts.decode(candidate["speed"]), _source(candidate)),
        "fits": escape(facts.verdict(candidate)),
    }
    if profile is not None:
        rows["measured"] = _told(
            facts.ratio(profile), "measured on this machine over predicted for the same run: prefill / decode"
        )
    cells = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())
    prices = "".join(f"<li>{escape(price)}</li>" for price in candidate["price"])
    family = escape(candidate["family"])
    return f'<div class="card {family}"><h3>{candidate["rank"]}. {family}</h3><dl>{cells}</dl><ul>{prices}</ul></div>'


def _sweeps() -> str:
    both = chart("prefill", "Time to read the prompts over context, by family") + chart(
        "decode", "Time per token over context"
    )
    text = (
        "<p class=dim>Lines are predictions with their range; crosses were measured; where a line ends, the model no longer "
        "fits. A click on a name hides its line.</p>"
    )
    return _section(
        "The tyranny of the square", f"{text}<div class=two>{both}</div>{chart('grows', 'Memory over context')}"
    )


def _layers(layers: list[list[Data]], answer: Data) -> str:
    """Every layer as a column of its sublayers, and a key."""
    names = list(dict.fromkeys(part["name"] for layer in layers for part in layer))
    tints = {name: _tint(index) for index, name in enumerate(names)}
    columns = "".join(
        '<div class=layer title="{}">{}</div>'.format(
            escape(f"layer {depth}: " + ", ".join(part["label"] for part in layer)),
            "".join(f'<i style="background:{tints[part["name"]]}"></i>' for part in layer),
        )
        for depth, layer in enumerate(layers, 1)
    )
    labels = {part["name"]: part["label"] for layer in layers for part in layer}
    key = "  ".join(
        f'<span><i class=key style="background:{tints[n]}"></i>{escape(labels[n])} ({escape(n)})</span>' for n in names
    )
    told = escape(f"{len(layers)} layers, from the input at the left: {answer['candidates'][0]['model']['layers']}")
    return f'<div class=stack role=img aria-label="{told}">{columns}</div><p>{key}</p><p class=dim>{told}</p>'


def _tint(index: int) -> str:
    return ("var(--transformer)", "var(--moe)", "var(--ssm)", "var(--hybrid)", "var(--dim)", "var(--bad)")[index % 6]


def _flips(answer: Data) -> str:
    items = "".join(
        f'<li><b class="{escape(f["family"])}">{escape(f["family"])}</b>, {escape(f["change"])}</li>'
        for f in answer["flips"]
    )
    return f"<p>The smallest changes that change the family:</p><ul>{items}</ul>" if items else ""


def _published(answer: Data) -> str:
    if not answer["published"]:
        return "<p class=dim>None of the published models was looked at.</p>"
    rows = "".join(
        f"<tr><td>{escape(m['name'])}</td><td>{escape(m['family'])}</td>"
        f"<td>{'yes' if m['fits'] else 'no'}, {escape(m['precision'])}</td>"
        f"<td class=n>{_told(units.gb(m['memory_bytes']), 'memory ledger')}</td><td>{escape(m['why'])}</td>"
        f"<td>{escape(m['licence'] or 'not known')}</td><td class=dim>{escape(m['source'])}</td></tr>"
        for m in answer["published"]
    )
    head = "".join(f"<th>{h}</th>" for h in ("model", "family", "fits", "memory", "why", "licence", "source"))
    return f"<p>Most users should download, not train.</p><div class=scroll><table><tr>{head}</tr>{rows}</table></div>"


def _notes(answer: Data, profile: Data | None) -> str:
    rows = "".join(
        f"<tr><td class=dim>{escape(label)}</td><td>{escape(text)}</td></tr>"
        for label, text in facts.lines(answer, profile)
        if label
    )
    return f"<div class=scroll><table>{rows}</table></div>"


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
    return (
        f"<details><summary>{head}</summary><div class=scroll><table>{terms}</table></div><ul>{evidence}</ul></details>"
    )


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
    table = f"<div class=scroll><table>{cells}</table></div>"
    return f"<details><summary>{len(rows)} numbers with their sources</summary>{table}</details>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def chart(name: str, alternative: str) -> str:
    """The place of a figure, and what to say where it cannot be seen."""
    return f'<div class=chart id="{name}" role="img" aria-label="{escape(alternative)}"></div>'


def _told(text: str, source: str) -> str:
    """A number that says on hover where it comes from."""
    return f'<abbr title="{escape(source)}" tabindex=0>{escape(text)}</abbr>'


def _source(candidate: Data) -> str:
    return (
        f"speed: {candidate['speed']['source']}, with its range"
        if candidate["speed"]
        else "not predicted: it does not fit"
    )


def _versions(report: Data) -> str:
    return ", ".join(f"{name} {number}" for name, number in report["versions"].items())


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
