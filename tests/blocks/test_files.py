"""Model files: what is written reads back, and what is no model is refused in one line."""

import os
from pathlib import Path

import pytest

from archcompass.blocks.model.files import MAX_FILE_BYTES, load, parse, read_mapping, to_yaml, write_text
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import FileFormatError, InputError, SpecError

GOOD = """\
archcompass: 1
name: small
hidden_size: 64
vocab_size: 100
layers: 2*(mamba | attention mlp)
blocks:
  mamba: {kind: mamba2, num_heads: 4, head_dim: 16, state_size: 16}
  attention: {kind: attention, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, rope: {theta: 1e6}}
  mlp: {kind: gated_mlp, intermediate_size: 96}
residual: {position: sandwich, norm: {kind: layer_norm, bias: false}}
"""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "model.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_reads_back_equal(tmp_path: Path) -> None:
    spec = load(written(tmp_path, GOOD))
    write_text(tmp_path / "again.yaml", to_yaml(spec))
    assert load(tmp_path / "again.yaml") == spec
    assert to_yaml(spec).startswith("archcompass: 1\nname: small\nhidden_size: 64\n")
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "is a list"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("just words", "is a str"),
        ("1: 2\n", "not a word"),
        (b"\xff\xfe\x00\x01", "not text"),
        ("a: \0", "zero bytes"),
        ("a: !!python/object/apply:os.system ['true']\n", "no plain YAML"),
        ("a: !tag b\n", "no plain YAML"),
        ("a: &x [1, 2]\nb: *x\n", "aliases"),
        ("a: [1, 2\n", "no plain YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "no plain YAML"),
        ("a: " + "9" * 5000, "no plain YAML"),
        ("a: b\n" + "#" * (MAX_FILE_BYTES + 1), "largest"),
        (GOOD.replace("archcompass: 1\n", ""), "header"),
        (GOOD.replace("archcompass: 1", "archcompass: 2"), "header"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str) else None,
)
def test_what_is_no_model_file_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(FileFormatError, match=words) as caught:
        load(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hidden_size: 64", "hidden_size: many", "model.yaml: hidden_size is 'many'"),
        ("hidden_size: 64", "hiden_size: 64", "hiden_size is not a field here; did you mean 'hidden_size'"),
        ("vocab_size: 100\n", "", "vocab_size is missing"),
        ("num_key_value_heads: 2", "num_key_value_heads: 3", "num_key_value_heads"),
        ("kind: mamba2", "kind: mamba22", "'mamba22' is not known; nearest: mamba2"),
        ("{kind: gated_mlp, intermediate_size: 96}", "gated_mlp", "a block is a mapping with a 'kind'"),
        ("intermediate_size: 96", "intermediate_siz: 96", "intermediate_siz is not a field here; did you mean"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        load(written(tmp_path, GOOD.replace(old, new)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_mapping(tmp_path)
    with pytest.raises(InputError):
        parse({})


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileFormatError, match="No space left"):
        write_text(tmp_path / "model.yaml", "text")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileFormatError, match="cannot be written"):
        write_text(tmp_path / "missing" / "model.yaml", "text")
