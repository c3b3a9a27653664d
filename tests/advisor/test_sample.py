"""A sample of the user's documents: lengths, likeness, and files that mean harm."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archcompass.advisor import sample
from archcompass.advisor.sample import measure
from archcompass.errors import ArchcompassError, FileFormatError, InputError

CHANCE = random.Random(6)


def written(subject: list[str], words: int = 900) -> str:
    return " ".join(CHANCE.choice(subject) for _ in range(words))


def subject() -> list[str]:
    return ["".join(CHANCE.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(7)) for _ in range(100)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": "x" * 99, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_lengths_are_quantiles_of_the_documents_alone(tmp_path: Path) -> None:
    found = measure(jsonl(tmp_path / "a.jsonl", ["x" * 4 * size for size in range(1, 101)]))
    assert (found.documents, found.p50, found.p95, found.p99, found.longest) == (100, 50, 95, 99, 100)
    assert found.whole
    assert found.keys["context"] == 95


def test_bytes_per_token_are_the_users(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["x" * 1000])
    assert measure(path, bytes_per_token=2.0).p50 == 500
    with pytest.raises(InputError, match="bytes_per_token is 0"):
        measure(path, bytes_per_token=0.0)


def test_one_subject_is_narrow_and_a_subject_for_each_document_is_not(tmp_path: Path) -> None:
    common = subject()
    alike = measure(jsonl(tmp_path / "alike.jsonl", [written(common) for _ in range(20)]))
    apart = measure(jsonl(tmp_path / "apart.jsonl", [written(subject()) for _ in range(20)]))
    assert alike.breadth == "narrow"
    assert apart.breadth == "encyclopedic"
    assert alike.likeness is not None
    assert apart.likeness is not None
    assert alike.likeness > 0.9 > 0.1 > apart.likeness


def test_half_and_half_lies_between(tmp_path: Path) -> None:
    common = subject()
    mixed = [written(common[:50] + subject()[:50]) for _ in range(20)]
    found = measure(jsonl(tmp_path / "mixed.jsonl", mixed))
    assert found.breadth in ("moderate", "broad")


def test_too_few_or_too_short_says_nothing_of_breadth(tmp_path: Path) -> None:
    assert measure(jsonl(tmp_path / "few.jsonl", [written(subject())] * 4)).breadth is None
    short = measure(jsonl(tmp_path / "short.jsonl", ["hello there"] * 50))
    assert short.breadth is None
    assert set(short.keys) == {"context"}
    assert "Too few" in short.said


def test_a_folder_is_a_document_a_file(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("word " * 10 * (number + 1))
    assert measure(tmp_path).documents == 3


def test_texts_are_found_in_lines_of_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['"plain"', '{"messages": [{"role": "user", "content": "12345678"}]}', '{"a": {"b": ["1234"]}}', "42"]
    path.write_text("\n".join(lines))
    assert measure(path).documents == 3, "a number is no document"


def test_a_tokenizer_counts(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    path = jsonl(tmp_path / "a.jsonl", ["one two three"])
    assert measure(path, tokenizer=tmp_path / "tokenizer.json").p50 == 3
    with pytest.raises(FileFormatError, match="no tokenizer"):
        measure(path, tokenizer=path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"\0\1\2", b"{", b"[" * 100_000, b"{}", b'{"text": 3}', b"nan", b"\xff\xfe{", b'{"text": ""}'],
    ids=["empty", "blank", "binary", "cut", "deep", "no text", "number", "nan", "bytes", "empty text"],
)
def test_what_is_no_sample_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ArchcompassError) as refused:
        measure(path)
    assert "\n" not in str(refused.value)


def test_odd_text_is_measured_and_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud800 half a letter"}\n{"text": "\\u001b[2J clear"}\n')
    assert measure(path).documents == 2
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    assert measure(path).documents == 1


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path / "nothing"):
        with pytest.raises(FileFormatError):
            measure(path)


def test_more_than_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MOST_BYTES", 4096)
    found = measure(jsonl(tmp_path / "a.jsonl", ["x" * 100] * 1000))
    assert not found.whole
    assert 0 < found.documents < 1000
    assert "were read" in found.said


def test_recommend_takes_context_and_breadth_from_it_unless_flags_say_otherwise(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [written(subject()) for _ in range(10)])
    for flags, breadth in (([], "encyclopedic"), (["--breadth", "narrow"], "narrow")):
        data = json.loads(cli("recommend", "--sample", path, "--json", *flags).out)
        assert data["workload"]["breadth"] == breadth
        assert data["workload"]["context"] == data["sample"]["p95"]
        assert data["notes"][0].startswith("a.jsonl: 10 documents")
