"""What a report says, as words and cells; how it looks is the renderer's. Reads JSON data and computes nothing new."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from archcompass.advisor import units

Data = dict[str, Any]


def sentence(data: Data) -> str:
    """The answer in one sentence."""
    pick, machine = data["candidates"][0], data["hardware"]
    family = pick["family"].upper() + (" with experts" if pick["family"] == "hybrid" and pick["experts"] else "")
    left = units.say_bytes(pick["memory"]["left_bytes"]) + (
        " to spare on each" if machine["count"] > 1 else " to spare"
    )
    system = pick["memory"].get("system_bytes")
    left += f", {units.say_bytes(system)} of experts in system memory" if system else ""
    what = "trains on" if data["workload"]["mode"] == "finetuning" or _trains(data) else "fits"
    return f"{family} · {size(pick)} · {pick['precision']} · {what} your {machine['name']} with {left}"


def size(candidate: Data) -> str:
    """'31B total, 3.4B active', or one figure where all are active."""
    total, active = candidate["parameters"]["total"], candidate["parameters"]["active"]
    if active >= 0.8 * total:
        return f"{units.say_figures(total)} parameters"
    return f"{units.say_figures(total)} total, {units.say_figures(active)} active"


def asked(data: Data) -> str:
    """What the user gave, key by key."""
    return told({key: value for key, value in data["workload"].items() if key not in data["defaults"]})


def told(values: Data) -> str:
    """Keys of a workload with their values, those without one left out."""
    return ", ".join(f"{key} {_value(key, value)}" for key, value in values.items() if value not in (None, False))


def headings(data: Data, *, measured: bool) -> list[str]:
    """Headings of the families' table."""
    memory = f"memory of {units.say_bytes(data['hardware']['total_memory_bytes'])}"
    length = units.say_tokens(data["candidates"][0]["speed"]["prompt"])
    times = ["tokens read", "days"] if _trains(data) else [f"prefill {length}", "decode/user"]
    return ["", "family", "model", memory, *times, *(["measured here"] if measured else []), "fits"]


def rows(data: Data, profile: Data | None, bar: int) -> list[list[str]]:
    """A row per candidate, in rank order."""
    capacity, trains = data["hardware"]["total_memory_bytes"], _trains(data)
    return [
        [
            str(candidate["rank"]),
            candidate["family"],
            candidate["name"],
            memory_cell(candidate["memory"]["total_bytes"], capacity, bar),
            *(budget(candidate["training"]) if trains else (prefill(candidate["speed"]), decode(candidate["speed"]))),
            *([ratio(profile) if candidate["rank"] == 1 else ""] if profile else []),
            verdict(candidate),
        ]
        for candidate in data["candidates"]
    ]


FRONT = ("family", "model", "weights", "dense-equivalent", "memory", "per user", "experts and windows")
"""Headings of what could be had instead."""

FRONT_ROWS = 10
"""Rows of it on a screen; --json has all."""

FRONT_NOTE = "dense-equivalent is sqrt(total · active), good to a factor of 1.6, and knows nothing of recall or length"


def front(data: Data) -> list[list[str]]:
    """A row per model of the front; dense-equivalent is sqrt(total · active)."""
    return [
        [
            point["family"],
            point["name"],
            point["precision"],
            units.say_figures(point["quality"]),
            units.say_bytes(point["memory_bytes"]),
            units.say_rate(point["per_user"], "t/s"),
            _style(point),
        ]
        for point in data["front"][:FRONT_ROWS]
    ]


def _style(point: Data) -> str:
    told = [f"{point['experts_per_token']} of {point['experts']} experts"] if point["experts"] else []
    return ", ".join([*told, *([f"windows of {units.say_tokens(point['window'])}"] if point["window"] else [])]) or "-"


def memory_cell(used: float, capacity: float, bar: int) -> str:
    """'####....  20.9 GB'; a plus where it overflows."""
    if not bar:
        return units.say_bytes(used)
    filled = round(bar * used / capacity)
    picture = "#" * min(filled, bar) + "." * (bar - filled) if used <= capacity else "#" * (bar - 1) + "+"
    return f"{picture} {units.say_bytes(used):>7}"


def budget(training: Data) -> tuple[str, str]:
    """(tokens that the training reads, days it takes)."""
    days = training["days"]
    return units.say_figures(training["tokens"]), f"{days:.0f}" if days >= 10 else f"{days:.2g}"


def prefill(speed: Data | None) -> str:
    """Time to the first token of one prompt, with half its range."""
    if not speed or speed.get("ttft_ms") is None:
        return "-"
    value, factors = speed["ttft_ms"], speed["range"]["prefill"]
    return units.say_spread(units.say_ms(value), units.say_ms(value * (factors["high"] - factors["low"]) / 2))


def decode(speed: Data | None) -> str:
    """Tokens a second that one user sees, with half its range."""
    if not speed or speed.get("per_user") is None:
        return "-"
    value, factors = speed["per_user"], speed["range"]["decode"]
    half = value * (1 / factors["low"] - 1 / factors["high"]) / 2
    return units.say_spread(units.say_rate(value, "t/s"), units.say_rate(half, "t/s"))


def verdict(candidate: Data) -> str:
    """Whether it fits, or why it is out."""
    if candidate["vetoes"]:
        return f"vetoed: {candidate['vetoes'][0]}"
    if not candidate["fits"]:
        over = candidate["memory"]["per_card_bytes"] - candidate["memory"]["capacity_bytes"]
        return f"no: {units.say_bytes(over)} short" if over > 0 else "no: within the margin"
    misses = [f"{name.removesuffix('_ms')} {factor:.1f}x" for name, factor in candidate["misses"].items()]
    return f"yes, misses {', '.join(misses)}" if misses else "yes"


def lines(data: Data, profile: Data | None, folder: str = "", question: str = "") -> list[tuple[str, str]]:
    """The sentences below the table: (label, text).

    Args:
        folder: where the answer's files lie; empty where none were written.
        question: what the user typed after the command's name, for the commands to type next.
    """
    pick = data["candidates"][0]
    said = [("It would flip to", flips(data))]
    if pick["why"][1:]:
        said.append(("Why this size", "; ".join(pick["why"][1:])))
    said.append(("Price you pay", "; ".join(pick["price"])))
    if pick["marginal"]:
        said.append(("Marginal price", "; ".join(map(marginal, pick["marginal"]))))
    if pick["split"]:
        said.append(("Split", split(pick["split"])))
    if data["published"]:
        near = (published(model, pick["speed"]["prompt"]) for model in data["published"][:3])
        said.append(("Open models near", "  ·  ".join(near)))
    said += [("Beware", text) for text in data["contradictions"]]
    said += [("Note", text) for text in data["notes"]]
    if data["defaults"]:
        said.append(("Taken as", assumed(data["defaults"])))
    return [
        *said,
        ("", ""),
        ("Numbers", numbers(data, profile)),
        *measured(profile),
        ("Next", following(profile, folder, question)),
    ]


def flips(data: Data) -> str:
    """The smallest changes that change the family."""
    told = [f"{flip['family']}, {flip['change']}" for flip in data["flips"][:4]]
    return "  ·  ".join(told) or "nothing: no single change of an input changes the family"


def marginal(price: Data) -> str:
    """'one more attention layer: 0.41 GB and 6 % of decode'."""
    parts = []
    if price["memory_bytes"]:
        parts.append(units.say_bytes(price["memory_bytes"]))
    if price["decode_percent"] is not None:
        parts.append(f"{price['decode_percent']:.1f} % of decode")
    return f"{price['what']}: {' and '.join(parts)}"


def split(cards: Data) -> str:
    """How several cards share the model."""
    text = f"{cards['how']}; {units.say_bytes(cards['per_card_bytes'])} on each"
    return f"{text}, links take {100 * cards['link_share']:.0f} % of a token's time" if cards["link_share"] else text


def published(model: Data, tokens: int) -> str:
    """'qwen3-next-80b-a3b: fp8, 45 GB', or why not.

    Args:
        tokens: what it is to read at once.
    """
    memory, most = units.say_bytes(model["memory_bytes"]), model["made_for"]
    if not model["fits"]:
        return f"{model['name']}: no ({memory})"
    if most is not None and most < tokens:
        return f"{model['name']}: fits ({memory}), but was made for {units.say_tokens(most)} tokens"
    return f"{model['name']}: yes, {model['precision']}, {memory}"


def numbers(data: Data, profile: Data | None) -> str:
    """Where the figures come from."""
    sources = sorted({candidate["speed"]["source"] for candidate in data["candidates"] if candidate["speed"]})
    here = "the pick was measured here" if profile else "none measured here"
    return (
        f"memory by the ledger; speed {' and '.join(sources) or 'not predicted'} for {data['hardware']['name']}; {here}"
    )


def measured(profile: Data | None) -> list[tuple[str, str]]:
    """What was run on this machine, how often, and how it compares with the prediction for the same run."""
    if profile is None:
        return []
    said = []
    for entry in profile["profiles"]:
        if entry["source"] in ("measured", "sampled"):
            ran = entry["ran"]
            runs = f"timed {ran.get('prefill_runs', '?')} and {ran.get('decode_runs', '?')} times"
            what = (
                "the whole model"
                if entry["source"] == "measured"
                else "each distinct block at full size, summed by count"
            )
            text = f"{what} on {ran.get('device', 'this machine')} in {ran.get('dtype', '?')}: {_speeds(entry)}; {runs}"
            said.append(("Measured here", text))
            said += [("", note) for note in entry["notes"]]
    return said


def _speeds(entry: Data) -> str:
    parts = []
    if entry["prefill"]:
        read = f"{units.say_tokens(entry['prompt'])} tokens read in {units.say_ms(entry['prefill']['ms'])}"
        parts.append(read + _beside(entry, "prefill"))
    if entry["decode"]:
        parts.append(f"{units.say_ms(entry['decode']['ms_per_token'])} a token" + _beside(entry, "decode"))
    return "; ".join(parts) or "nothing in the time given"


def _beside(entry: Data, phase: str) -> str:
    return f", {times(entry['ratio'][phase])} what was predicted for it" if phase in entry["ratio"] else ""


def following(profile: Data | None, folder: str, question: str) -> str:
    """What to do next, with the same question."""
    advise = " ".join(["archcompass advise", *([question] if question else []), "-o out/"])
    if profile is None:
        kept = "out/workload.yaml"
        return f"{advise}; then archcompass compare {kept} --sweep context  ·  archcompass recommend {kept} --explain"
    if not folder:
        return f"{advise} keeps model and answer"
    model, asked = (quote(str(Path(folder, name))) for name in ("model.yaml", "workload.yaml"))
    check = f"on {profile['hardware']}: {profile['check']}"
    return f"{check}  ·  archcompass verify {model}  ·  archcompass compare {asked} --sweep context"


def ratio(profile: Data) -> str:
    """Measured over predicted, for the same run on this machine."""
    for entry in profile["profiles"]:
        if entry["ratio"]:
            return " / ".join(times(ratio) for ratio in entry["ratio"].values())
    return "-"


def times(ratio: float) -> str:
    """'26x', '5.8x', '0.95x'."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def assumed(defaults: Data) -> str:
    """The keys nobody gave, with the value taken for each; those that are simply absent last."""
    absent = [key for key, taken in defaults.items() if taken["value"] in (None, False)]
    parts = told({key: taken["value"] for key, taken in defaults.items()})
    return ", ".join([parts, *([f"no {' or '.join(absent)}"] if absent else [])])


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes"
    if isinstance(value, int) and key in ("context", "output", "corpus"):
        return units.say_tokens(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _trains(data: Data) -> bool:
    """Whether the size was decided by training the model, and not by running it."""
    pick = data["candidates"][0]
    return bool(pick["training"]) and pick["speed"]["ttft_ms"] is None
