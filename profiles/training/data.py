"""Text as tokens, cut into windows for torch's DataLoader: bytes, JSON lines, or what a given tokenizer makes of them.

The end of the data is held out. The order of the windows is drawn anew for each pass from the seed and the number of the pass
alone, so that a resumed run finds its place without remembering anything but the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from archcompass.errors import FileFormatError, InputError
from archcompass.profiles.training.plan import Plan

MAX_LISTED_BYTES = 8 * 2**30
"""JSON lines and tokenized text are held in memory; plain bytes stay in their file."""

BYTES = 256


@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens of a file.

    Attributes:
        values: [tokens] of a small integer type; a mapped file where tokens are its bytes.
        vocab_size: no token is as large.
        kind: "bytes", "jsonl" or "tokens".
        name: of the file.
        digest: SHA-256 of the tokens, by which a resumed run knows its data again.
    """

    values: numpy.ndarray[Any, Any]
    vocab_size: int
    kind: str
    name: str
    digest: str


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Neighbouring windows of `sequence` tokens and, as targets, the tokens one further.

    Args:
        values: [tokens].
        sequence: tokens of one window.
    """

    def __init__(self, values: numpy.ndarray[Any, Any], sequence: int) -> None:
        self.values, self.sequence = values, sequence

    def __len__(self) -> int:
        return (len(self.values) - 1) // self.sequence

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.sequence
        window = torch.from_numpy(self.values[start : start + self.sequence + 1].astype(numpy.int64))
        return window[:-1], window[1:]


class Order(Sampler[int]):
    """Windows of one process from step `start` on, pass after pass, each in an order of its own; it never ends.

    Args:
        windows: how many there are.
        plan: batch and seed.
        start: steps already done.
        rank, world: this process, of how many.
    """

    def __init__(self, windows: int, plan: Plan, start: int, rank: int = 0, world: int = 1) -> None:
        self.windows, self.plan, self.start, self.rank, self.world = windows, plan, start, rank, world

    def __iter__(self) -> Iterator[int]:
        passes, skipped = divmod(self.start * self.plan.batch, self.windows)
        position = 0
        while True:
            generator = torch.Generator().manual_seed(self.plan.seed + passes)
            for index in torch.randperm(self.windows, generator=generator)[skipped:].tolist():
                if position % self.world == self.rank:
                    yield index
                position += 1
            passes, skipped = passes + 1, 0


def read(path: Path, tokenizer: Path | None = None) -> Tokens:
    """The tokens of a file: of JSON lines the texts under "text", of any other file its bytes.

    Args:
        tokenizer: a tokenizer.json; needs the package `tokenizers`.

    Raises:
        FileFormatError: no such file, empty, too large, or a line that is no JSON object with a text.
        InputError: a tokenizer without the package for it.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}") from error
    is_listed = path.suffix in (".jsonl", ".ndjson")
    if not path.is_file() or not size:
        raise FileFormatError(f"{path} is {'empty' if path.is_file() else 'no file'}; give a file of text")
    if size > MAX_LISTED_BYTES and (is_listed or tokenizer):
        raise FileFormatError(
            f"{path.name} is {size:,} bytes; JSON lines and tokenized text go up to {MAX_LISTED_BYTES:,}"
        )
    if tokenizer is not None:
        return _tokenized(path, tokenizer, is_listed)
    if is_listed:
        values = numpy.frombuffer("\n".join(_texts(path)).encode(), dtype=numpy.uint8)
        return Tokens(values, BYTES, "jsonl", path.name, _digest(values))
    mapped = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    return Tokens(mapped, BYTES, "bytes", path.name, _digest(mapped))


def _texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text(line, f"{path.name} line {number}")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path.name} is not text (byte {error.start} of a block is no UTF-8)") from error


def _text(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is no JSON: {error}") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise FileFormatError(f"{where} is no object with a text under 'text'")
    # A lone surrogate is legal JSON and no Unicode; it becomes a question mark.
    return text.encode("utf-8", errors="replace").decode()


def _tokenized(path: Path, tokenizer: Path, is_listed: bool) -> Tokens:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("tokenizer needs the package 'tokenizers'; without it models are trained on bytes") from error
    try:
        made = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the package raises nothing narrower
        raise FileFormatError(f"{tokenizer.name} is no tokenizer.json: {error}") from error
    texts = _texts(path) if is_listed else iter([path.read_text(encoding="utf-8", errors="replace")])
    ids = [token for text in texts for token in made.encode(text).ids]
    values = numpy.array(ids, dtype=numpy.uint32)
    return Tokens(values, made.get_vocab_size(), "tokens", path.name, _digest(values))


def _digest(values: numpy.ndarray[Any, Any]) -> str:
    digest, size = hashlib.sha256(), 2**24
    for start in range(0, len(values), size):
        digest.update(numpy.ascontiguousarray(values[start : start + size]).tobytes())
    return digest.hexdigest()


def split(tokens: Tokens, plan: Plan) -> tuple[Windows, Windows]:
    """Windows to train on and windows held out, at least one of each.

    Raises:
        InputError: too few tokens for the two; says how long a sequence could be.
    """
    count, held = len(tokens.values), max(int(len(tokens.values) * plan.held_out), plan.sequence + 1)
    if count - held < plan.sequence + 1:
        longest = max((count - 2) // 2, 0)
        hint = f"at most {longest}" if longest >= 2 else "a longer file"
        raise InputError(
            f"sequence is {plan.sequence}, and {tokens.name} holds {count} tokens; training and held-out part need "
            f"{plan.sequence + 1} each: {hint}"
        )
    return Windows(tokens.values[: count - held], plan.sequence), Windows(tokens.values[count - held :], plan.sequence)


def batches(
    windows: Windows, plan: Plan, start: int, rank: int = 0, world: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """An endless stream of this process's batches: (tokens, targets), each [batch / world, sequence]."""
    order = Order(len(windows), plan, start, rank, world)
    return DataLoader(windows, batch_size=plan.batch // world, sampler=order)
