"""What a sample of the user's own documents says: how long they are, and how far they are about the same thing.

Lengths are bytes over an assumed number of bytes a token takes, or counted by a tokenizer that is given. Likeness is by
compression (after Cilibrasi and Vitanyi, arXiv cs/0312044): how much one document helps to compress another, over how much its
own first half helps with its second. Where another document helps as much as its own, all speak of one thing; language, format
and length cancel. It is a rough measure with edges by judgement, and the answer says so.
"""

from __future__ import annotations

import json
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archcompass.advisor.result import Result
from archcompass.errors import FileFormatError, InputError

BYTES_PER_TOKEN = 4.0
"""English under a vocabulary of 128k; code about 3.3, other scripts 2 to 6."""

MOST_BYTES = 64 * 2**20
"""Read of a sample at most; the rest is left, and the answer says so."""

LEAST_DOCUMENT_BYTES = 1000
"""A shorter document is too short to tell what it is about."""

HALF_BYTES = 4096
"""Of each half that is compared, at most."""

COMPARED, NEIGHBOURS = 40, 6
"""Documents that are compared, and with how many others each."""

EDGES = (("narrow", 0.6), ("moderate", 0.35), ("broad", 0.15), ("encyclopedic", 0.0))
"""Likeness from which a sample counts as so broad. Judgement: lines of one log come to 0.66, the adapters of this package 0.65,
licences 0.55, notes of one field 0.40, the modules of Python's library 0.25."""

LEAST_HELP = 0.02
"""What a document's first half must save of its second: text that repeats nothing tells nothing."""

TEXT_KEYS = ("text", "content", "prompt", "document", "body", "message", "input")
"""Keys of a JSON line whose text is taken; else all texts in it."""


@dataclass(frozen=True, kw_only=True)
class Sample(Result):
    """What was measured.

    Attributes:
        source: the file's name.
        documents, total_bytes: how many, how much.
        whole: whether all of the file was read.
        p50, p95, p99, longest: tokens of a document.
        tokens_by: how bytes became tokens.
        likeness: how much another document helps to compress one, over how much its own half does; None when too few are long
            enough.
        breadth: the workload's word for it; None likewise.
    """

    source: str
    documents: int
    total_bytes: int
    whole: bool
    p50: int
    p95: int
    p99: int
    longest: int
    tokens_by: str
    likeness: float | None
    breadth: str | None

    @property
    def keys(self) -> dict[str, Any]:
        """The workload's keys that it answers."""
        return {"context": self.p95} | ({"breadth": self.breadth} if self.breadth else {})

    @property
    def said(self) -> str:
        """The measurement in a sentence or two."""
        part = "" if self.whole else f", of which the first {MOST_BYTES / 2**20:.0f} MiB were read"
        many = f"{self.documents:,} document" + ("s" if self.documents != 1 else "")
        lengths = (
            f"{self.source}: {many}{part}. Half are shorter than {self.p50:,} tokens, 95 of 100 than {self.p95:,}, 99 than "
            f"{self.p99:,} ({self.tokens_by})."
        )
        if self.likeness is None:
            return f"{lengths} Too few are long enough to tell how broad they are."
        return (
            f"{lengths} To compress one, another helps {self.likeness:.2f} times as much as its own first half: "
            f"{self.breadth}."
        )


def measure(path: Path, *, bytes_per_token: float = BYTES_PER_TOKEN, tokenizer: Path | None = None) -> Sample:
    """Lengths and breadth of the documents in a file.

    Args:
        path: JSON lines (`.jsonl`, `.ndjson`), a document a line; or a folder or a text file, where a file is a document.
        bytes_per_token: assumed where no tokenizer is given.
        tokenizer: a `tokenizer.json`.

    Raises:
        FileFormatError: no such file, no text, or nothing in it.
        InputError: a line that is no JSON, or no tokenizers to read a tokenizer with.
    """
    texts, whole = _documents(path)
    count, by = _counter(tokenizer, bytes_per_token)
    lengths = sorted(count(text) for text in texts)
    likeness = _likeness([text for text in texts if len(text) >= LEAST_DOCUMENT_BYTES])
    return Sample(
        source=path.name,
        documents=len(texts),
        total_bytes=sum(map(len, texts)),
        whole=whole,
        p50=_quantile(lengths, 0.5),
        p95=_quantile(lengths, 0.95),
        p99=_quantile(lengths, 0.99),
        longest=lengths[-1],
        tokens_by=by,
        likeness=likeness,
        breadth=None if likeness is None else next(word for word, edge in EDGES if likeness >= edge),
    )


def _documents(path: Path) -> tuple[list[bytes], bool]:
    """The documents, and whether all was read."""
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    found: list[bytes] = []
    left, whole = MOST_BYTES, True
    for file in files:
        data = _read(file, left)
        whole, left = whole and len(data) <= left, left - len(data)
        found += _lines(file.name, data[:MOST_BYTES]) if file.suffix in (".jsonl", ".ndjson") else [data]
        if left <= 0:
            whole = whole and file == files[-1]
            break
    found = [text for text in found if text.strip()]
    if not found:
        raise FileFormatError(
            f"{path} holds no text; give JSON lines with a document each, a text file, or a folder of them"
        )
    return found, whole


def _read(path: Path, most: int) -> bytes:
    """A file's first bytes, one more than `most` when there are more.

    Raises:
        FileFormatError: it cannot be read, is no regular file, or no text.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileFormatError(f"{path} is not a regular file; give JSON lines, a text file, or a folder of them")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in data[:65536]:
        raise FileFormatError(f"{path} is not text; give JSON lines, a text file, or a folder of them")
    return data


def _lines(name: str, data: bytes) -> Iterator[bytes]:
    """The text of each JSON line; a last line that was cut off is left."""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and len(data) >= MOST_BYTES:
                return
            raise InputError(f"{name} line {number} is not JSON; write one object or string a line") from error
        yield "\n".join(_texts(value)).encode("utf-8", "replace")


def _texts(value: Any) -> Iterator[str]:
    """The texts of a JSON value: of the first usual key, else all of them. Without recursion: lines may be deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            known = [one[key] for key in TEXT_KEYS if isinstance(one.get(key), str)]
            waiting = [*(known[:1] or one.values()), *waiting]
        elif isinstance(one, list):
            waiting = [*one, *waiting]


def _counter(tokenizer: Path | None, bytes_per_token: float) -> tuple[Callable[[bytes], int], str]:
    """(tokens of a document, how they are counted)."""
    if tokenizer is None:
        if not 0.5 <= bytes_per_token <= 100:
            raise InputError(f"bytes_per_token is {bytes_per_token:g}; it must lie between 0.5 and 100; nearest: 4")
        return lambda text: max(1, round(len(text) / bytes_per_token)), f"at {bytes_per_token:g} bytes a token"
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("tokenizer needs the package tokenizers; install it, or leave the flag out") from error
    _read(tokenizer, MOST_BYTES)
    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises Exception itself
        raise FileFormatError(f"{tokenizer} is no tokenizer.json: {str(error)[:120]}") from error
    return lambda text: max(1, len(loaded.encode(text.decode("utf-8", "replace")).ids)), f"counted by {tokenizer.name}"


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The value that `share` of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-round(share * 1000 * len(ordered)) // 1000) - 1))]


def _likeness(texts: Sequence[bytes]) -> float | None:
    """Help of another document over help of one's own half, averaged; None below five documents, or where halves help
    nothing."""
    if len(texts) < 5:
        return None
    chosen = [texts[index * len(texts) // min(len(texts), COMPARED)] for index in range(min(len(texts), COMPARED))]
    halves = [_halves(text) for text in chosen]
    own = [_help(first, second) for first, second in halves]
    steps = range(1, min(NEIGHBOURS, len(halves) - 1) + 1)
    others = [
        _help(halves[(index + step * len(halves) // (len(steps) + 1)) % len(halves)][0], second)
        for index, (_, second) in enumerate(halves)
        for step in steps
    ]
    mean = sum(own) / len(own)
    return min(1.0, max(0.0, sum(others) / len(others) / mean)) if mean >= LEAST_HELP else None


def _halves(text: bytes) -> tuple[bytes, bytes]:
    middle = len(text) // 2
    return text[max(0, middle - HALF_BYTES) : middle], text[middle : middle + HALF_BYTES]


def _help(known: bytes, text: bytes) -> float:
    """Share of the compressed size of `text` that `known` saves."""
    alone, helped = (_compressed(text, start) for start in (b"", known))
    return 1.0 - helped / alone


def _compressed(text: bytes, known: bytes) -> int:
    squeeze = zlib.compressobj(9, zdict=known) if known else zlib.compressobj(9)
    return len(squeeze.compress(text)) + len(squeeze.flush())
