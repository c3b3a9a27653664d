"""Machines as data: memory, bandwidth, arithmetic and links of every accelerator we know, found as people write them.

The figures come from `data/gpus.json`, each with its source. Dense rates only; memory is what a process really sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from archcompass.errors import InputError, UnknownNameError, nearest
from archcompass.profiles.units import GB, GIB, parse_bandwidth, parse_bytes, parse_flops

MAX_COUNT = 1024
BOUNDLESS = 2**62  # bytes

# One direction, what a copy between cards sees of PCIe: x16 lanes of each generation, in bytes per second.
_PCIE_BYTES_PER_SECOND = {"3": 13e9, "4": 25e9, "5": 50e9, "6": 100e9}

FP16_SUMS = "fp16_accumulate_fp16"
"""Products whose sums are fp16 too: twice the rate of ordinary ones on GeForce cards, the same on others."""

# What computes instead where a machine has no unit for a dtype: quantised weights are widened first.
_INSTEAD = {
    "fp4": "fp8", "fp8": "bf16", "int8": "bf16", FP16_SUMS: "fp16", "bf16": "fp16", "fp16": "fp32",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine: `count` equal cards.

    Attributes:
        id: the name scripts use.
        name: the name people read.
        vendor: who makes it.
        kind: datacenter, workstation, geforce, consumer, edge, apple, apu, cpu or described.
        count: cards.
        memory_bytes: usable by a process, of one card.
        memory_gb: as marketed, of one card.
        bandwidth_bytes_per_second: of one card's memory.
        flops: dense FLOP/s of one card by dtype ("fp32", "bf16", "fp16", "fp8", "int8", "fp4", and `FP16_SUMS`).
        link_bytes_per_second: from one card to its peers, one direction.
        is_cpu: whether it is a processor and not an accelerator.
        architecture: the vendor's generation.
        release_year: when it came out, 0 if unknown.
        source: where the figures come from.
        confidence: how far they were confirmed.
        note: what else to know.
    """

    id: str
    name: str
    vendor: str = ""
    kind: str = "described"
    count: int = 1
    memory_bytes: int
    memory_gb: float
    bandwidth_bytes_per_second: float
    flops: Mapping[str, float] = field(hash=False)
    link_bytes_per_second: float = _PCIE_BYTES_PER_SECOND["4"]
    is_cpu: bool = False
    architecture: str = ""
    release_year: int = 0
    source: str = ""
    confidence: str = ""
    note: str = ""

    def with_room_for_all(self) -> Hardware:
        """The same machine with memory enough for whatever is asked, for questions of time alone."""
        return replace(self, memory_bytes=BOUNDLESS)

    @property
    def total_memory_bytes(self) -> int:
        """Usable memory of all cards."""
        return self.memory_bytes * self.count

    @property
    def label(self) -> str:
        """Name with the count in front when there are several."""
        return f"{self.count}x {self.name}" if self.count > 1 else self.name

    @property
    def tag(self) -> str:
        """The id as it can be given back to `find`: "2x rtx-4090"."""
        return f"{self.count}x {self.id}" if self.count > 1 else self.id

    def rate(self, compute: str) -> float:
        """Dense FLOP/s of one card in `compute`; where it has no unit for it, of the dtype that serves instead."""
        while compute not in self.flops:
            if compute not in _INSTEAD:
                return max(self.flops.values())
            compute = _INSTEAD[compute]
        return self.flops[compute]


def find(name: str) -> Hardware:
    """The machine that `name` means: an id, or as people write it: "4090", "RTX 4090", "2x H100 SXM 80GB", "cpu", or a card
    described by hand, "24GB 1008GB/s 165TFLOPS".

    A card that is sold in several form factors with the same memory is taken as SXM when none is named, as it is rented
    most; two sizes of memory are two cards, and the name is refused.

    Raises:
        UnknownNameError: nothing, or more than one thing, is called so; lists the nearest ids.
        InputError: an impossible count.
    """
    text = str(name).strip().lower()
    exact = _by_id().get(text)
    if exact is not None:
        return exact
    count, rest = _split_count(text)
    if not 1 <= count <= MAX_COUNT:
        raise InputError(f"gpu is {name!r}: the number of cards must lie between 1 and {MAX_COUNT}")
    if rest in ("cpu", "this cpu", "this machine"):
        return _this_cpu(count, name)
    found = _by_id().get(rest) or _by_id().get(rest.replace(" ", "-")) or _described(rest)
    found = found or _match(rest) or _match(f"{rest} sxm")
    if found is None:
        raise _unknown(name, rest)
    return replace(found, count=count) if count > 1 else found


def known() -> list[Hardware]:
    """Every accelerator in the table, in its order: data centre, workstation, GeForce, edge, then other vendors."""
    return list(_by_id().values())


def details(identifier: str) -> dict[str, Any]:
    """The whole entry of the table, sources and measured figures included.

    Raises:
        UnknownNameError: no card has this id.
    """
    found = find(identifier)
    for entry in _table()["gpus"]:
        if entry["id"] == found.id:
            return dict(entry)
    raise UnknownNameError("card", identifier, _by_id())


def describe(
    *,
    vram: str | float,
    bandwidth: str | float,
    tflops: str | float,
    fp8_tflops: str | float | None = None,
    link: str | float | None = None,
    count: int = 1,
    name: str = "",
) -> Hardware:
    """A machine that is in no table, from its memory, bandwidth and dense bf16 rate. `find` reads its id.

    Raises:
        InputError: a figure that cannot be read, or is not positive.
    """
    if not 1 <= count <= MAX_COUNT:
        raise InputError(f"count is {count}: the number of cards must lie between 1 and {MAX_COUNT}")
    memory = parse_bytes(vram, "vram")
    rate = parse_flops(tflops, "tflops")
    flops = {"fp32": rate / 4, "bf16": rate, "fp16": rate}
    if fp8_tflops is not None:
        flops["fp8"] = parse_flops(fp8_tflops, "fp8_tflops")
    bandwidth_bytes = parse_bandwidth(bandwidth)
    return Hardware(
        id=f"{memory / GB:.12g}GB {bandwidth_bytes / GB:.12g}GB/s {rate / 1e12:.12g}TFLOPS",
        name=name or f"{memory / GB:.3g}GB card",
        count=count,
        memory_bytes=memory,
        memory_gb=memory / GB,
        bandwidth_bytes_per_second=bandwidth_bytes,
        flops=flops,
        link_bytes_per_second=parse_bandwidth(link, "link") if link is not None else _PCIE_BYTES_PER_SECOND["4"],
        source="described by the user",
        note="fp32 taken as a quarter of the bf16 rate",
    )


def with_memory(hardware: Hardware, memory_bytes: float) -> Hardware:
    """The same machine with another amount of usable memory per card.

    Raises:
        InputError: not positive.
    """
    if memory_bytes <= 0:
        raise InputError(f"vram is {memory_bytes}: it must be positive")
    return replace(hardware, memory_bytes=int(memory_bytes), memory_gb=memory_bytes / GB)


@cache
def _table() -> dict[str, Any]:
    text = (Path(__file__).parent / "data/gpus.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def _by_id() -> dict[str, Hardware]:
    return {entry["id"]: _read(entry) for entry in _table()["gpus"]}


def _read(entry: Mapping[str, Any]) -> Hardware:
    rates = {dtype: tflops * 1e12 for dtype, tflops in entry["tflops"].items() if dtype in (*_INSTEAD, "fp32")}
    rates.setdefault("fp32", rates.get("bf16", rates["fp16"]) / 2)
    generation = str(entry.get("pcie", "4"))[0]
    link = entry["link_gb_s"] * GB / 2 if "link_gb_s" in entry else _PCIE_BYTES_PER_SECOND.get(generation, 25e9)
    return Hardware(
        id=entry["id"],
        name=entry["name"],
        vendor=entry["vendor"],
        kind=entry["kind"],
        memory_bytes=int(entry["memory_gib_usable"] * GIB),
        memory_gb=entry["memory_gb"],
        bandwidth_bytes_per_second=entry["bandwidth_gb_s"] * GB,
        flops=rates,
        link_bytes_per_second=link,
        architecture=entry["architecture"],
        release_year=entry["release_year"],
        source=entry["source"],
        confidence=entry["confidence"],
        note=entry.get("note", ""),
    )


_IDLE = {"nvidia", "geforce", "amd", "radeon", "instinct", "intel", "apple", "google", "aws", "huawei", "gpu", "card"}
_IDLE |= {"edition", "generation", "tesla", "jetson", "dgx"}
_SYNONYMS = {"sxm2": "sxm", "sxm4": "sxm", "sxm5": "sxm", "hgx": "sxm", "nvlink": "sxm", "spark": "gb10"}

# A word that makes another product of the same number: its absence from the question is never overlooked.
_DISTINCT = {"ti", "super", "max", "ultra", "pro", "xt", "xtx", "nvl", "orig", "gcd", "ada", "orin"}

# Generations and lines: alone they name no card, though only one of theirs may be in the table.
_LINES = {"volta", "turing", "ampere", "hopper", "blackwell", "grace"}
_LINES |= {"rtx", "gtx", "rx", "quadro", "arc", "sxm", "pcie"}


def _words(text: str) -> list[str]:
    """Words of a name, run-together parts split: "rtx4090ti" is rtx 4090 ti, "80 GB" is 80gb, "H 100" h100, SXM5 is sxm."""
    text = re.sub(r"\b(macbook (pro|air)|mac (studio|mini|pro))\b", "", text.lower())
    text = re.sub(r"(\d)\s*(gb|gib|g)\b", r"\1gb ", text)
    text = re.sub(r"\b(rtx|gtx|rx)(?=\d)", r"\1 ", text)
    text = re.sub(r"^([a-z])\s+(?=\d)", r"\1", text)
    text = re.sub(r"(?<=\d)(ti|super|xtx?|sxm\d?|pcie|nvl)\b", r" \1", text)
    words = [_SYNONYMS.get(word, word) for word in re.split(r"[^a-z0-9+]+", text)]
    return [word for word in words if word and word not in _IDLE]


@cache
def _index() -> list[tuple[Hardware, frozenset[str], frozenset[str]]]:
    return [
        (card, frozenset(_words(card.id)), frozenset(_words(f"{card.id} {card.name} {entry['memory_type']}")))
        for card, entry in zip(_by_id().values(), _table()["gpus"], strict=True)
    ]


def _match(text: str) -> Hardware | None:
    """The one card whose words hold all words of `text` with the fewest left over; None when there is none, or two."""
    words = _words(text)
    memory = {float(word[:-2]) for word in words if re.fullmatch(r"\d+gb", word)}
    asked = {word for word in words if not re.fullmatch(r"\d+gb", word)}
    if all(word in _LINES or re.fullmatch(r"\d{1,3}", word) for word in asked):
        return None
    ranked = sorted(
        (len(own - asked), card.id)
        for card, own, every in _index()
        if asked <= every and not (own - asked) & _DISTINCT and memory <= {card.memory_gb}
    )
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return _by_id()[ranked[0][1]]


def _described(text: str) -> Hardware | None:
    """The card that "24GB 1008GB/s 165TFLOPS" describes; None where these are not the three."""
    number = r"([\d.]+\s*"
    parts = re.fullmatch(rf"{number}gi?b)[\s,]+{number}[gt]i?b/s)[\s,]+{number}[tp]flops?)", text)
    return describe(vram=parts[1], bandwidth=parts[2], tflops=parts[3]) if parts else None


def _split_count(text: str) -> tuple[int, str]:
    """(cards, rest) of "2x rtx 4090", "8 × h100-sxm", "2 h100", "rtx 4090 x2"."""
    front = re.fullmatch(r"(\d+)\s*[x×*](?!tx?\b)\s*(\S.*)", text)
    front = front or re.fullmatch(r"(\d{1,2})\s+(?!gi?b)([a-z].*)", text)
    back = re.fullmatch(r"(.*\S)(?:\s+[x×*]\s*|(?<=\d)[x×*]|\s*×\s*)(\d+)", text)
    if front and not (back and int(front[1]) > MAX_COUNT):  # of "4090 x2" the 4090 is the card
        return int(front[1]), front[2]
    return (int(back[2]), back[1].strip()) if back else (1, text)


def _unknown(name: str, rest: str) -> UnknownNameError:
    """Names the cards that share the most telling words with what was asked, else those with a word spelled like one of it."""
    words = set(_words(rest))
    asked, line = words - _LINES, words & _LINES
    like = {like for word in asked for like in _spelled_like(word, 3 if line else 1)}  # a line decides among several
    error = UnknownNameError("card", str(name)[:80], _by_id())
    error.nearest = _sharing(asked) or (_sharing(like | line) if like else [])
    listed = f"; nearest: {', '.join(error.nearest)}" if error.nearest else ""
    by_hand = 'describe it by hand: "24GB 1008GB/s 165TFLOPS"'
    error.args = (f"card {str(name)[:80]!r} is not known, or could be several{listed} (or {by_hand})",)
    return error


def _sharing(asked: set[str]) -> list[str]:
    """Ids of up to four cards that share the most words with `asked`; none where nothing is shared."""
    shared = sorted((-len(asked & every), len(own - asked), card.id) for card, own, every in _index())
    return [identifier for hits, _, identifier in shared if hits and hits == shared[0][0]][:4]


def _spelled_like(word: str, most: int) -> list[str]:
    """The words of cards' ids nearest in spelling, if any; of a number other numbers."""
    known = {own for _, words, _ in _index() for own in words if len(own) > 2 and own.isdigit() >= word.isdigit()}
    return nearest(word, sorted(known), most)


def _this_cpu(count: int, name: str) -> Hardware:
    if count > 1:
        raise InputError(f"gpu is {name!r}: this machine is one; write cpu")
    from archcompass.profiles.cpu import this_cpu

    return this_cpu()
