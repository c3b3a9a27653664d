"""The compact pattern of layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archcompass.blocks.model.pattern import MAX_LAYERS, compress, expand
from archcompass.errors import SpecError

NAMES = st.sampled_from(["attention", "mamba", "mlp", "moe"])
LAYERS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=24).map(tuple)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("a", [("a",)]),
        ("a m", [("a", "m")]),
        ("2*(a m)", [("a", "m")] * 2),
        ("a | m", [("a",), ("m",)]),
        ("2*(a m | s) | a", [("a", "m"), ("s",), ("a", "m"), ("s",), ("a",)]),
        ("2 * ( 3*(s m) | a m )", ([("s", "m")] * 3 + [("a", "m")]) * 2),
        ("(a | b)", [("a",), ("b",)]),
        ("my-block_2 m", [("my-block_2", "m")]),
    ],
)
def test_patterns_stand_for_their_layers(pattern: str, layers: list[tuple[str, ...]]) -> None:
    assert list(expand(pattern)) == layers


@given(LAYERS)
def test_compression_loses_nothing(layers: tuple[tuple[str, ...], ...]) -> None:
    assert expand(compress(layers)) == layers


def test_compression_finds_nested_repeats() -> None:
    assert compress(expand("32*(attention mlp)")) == "32*(attention mlp)"
    jamba = "4*(3*(s m | s e) | a m | s e)"
    assert len(compress(expand(jamba))) <= len(jamba)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("2*a", "followed by"),
        ("0*(a)", "between 1"),
        (f"{MAX_LAYERS + 1}*(a)", "between 1"),
        ("99*(99*(a))", "more than"),
        ("2*(a", "never closed"),
        ("a)", "no place"),
        ("a | | b", "expected a block name"),
        ("| a", "expected a block name"),
        ("a |", "expected a block name"),
        ("2*()", "expected a block name"),
        ("2 a", "expected a block name"),
        ("a; b", "cannot read"),
        ("é", "cannot read"),
        ("(" * 20 + "a" + ")" * 20, "brackets deep"),
    ],
)
def test_bad_patterns_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        expand(pattern)


def test_nothing_compresses_to_nothing() -> None:
    with pytest.raises(SpecError, match="empty"):
        compress(())
