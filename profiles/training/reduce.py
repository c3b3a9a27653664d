"""A design made small without losing anything it is made of, so that it can be proven to learn where it cannot be trained.

Every distinct layer stays once, in its order. Then every size (heads, channels, experts, ranks, windows) is halved in turn, as
long as the model can still exist and every block keeps its traits: an expert mixture stays sparse, a window stays a window.
No block is known by name here: what may shrink is found by asking the blocks whether they can exist that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from archcompass.blocks.base import Traits
from archcompass.blocks.model.pattern import compress
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import SpecError

SMALLEST_SIZE, SMALLEST_WIDTH = 8, 64
"""Below these, counts such as a convolution's taps would be taken for sizes, and nothing is left to learn with."""

Place = tuple[str, ...]
"""Keys that lead to one number in a model's data."""


def reduced(spec: ModelSpec, parameters: int, vocab_size: int | None = None) -> ModelSpec:
    """`spec` with at most `parameters` parameters, or as near as its blocks allow.

    Args:
        parameters: the number aimed at.
        vocab_size: tokens it is trained on, when fewer than its own.

    Returns:
        The same model when it is small enough already.
    """
    small = spec.model_copy(update={"vocab_size": min(spec.vocab_size, vocab_size or spec.vocab_size)})
    small = ModelSpec.model_validate(small.model_dump())
    if small.parameters().total > parameters:
        small = small.with_layers(compress(tuple(dict.fromkeys(small.expanded))))
    for half in HALVES:
        while small.parameters().total > parameters:
            narrower = _narrower(small, half)
            if narrower == small:
                break
            small = narrower
    return small


def _half_of(multiple: int) -> Callable[[int], int]:
    """Halves what is a multiple of `multiple`, and leaves the rest."""
    return lambda value: value if value % multiple else value // 2


def _rounded_half(value: int) -> int:
    """Half of a size, rounded up to a multiple of eight."""
    return -(-value // (2 * SMALLEST_SIZE)) * SMALLEST_SIZE


HALVES = (_half_of(16), _half_of(8), _rounded_half, _half_of(2))
"""Ways to halve, the next where the last finds nothing more: sizes stay in proportion, and rows multiples of eight or four (16
bytes, which grouped matrix products address), while they can."""


def _narrower(spec: ModelSpec, half: Callable[[int], int]) -> ModelSpec:
    """One round: every size is halved (`half`), alone, or else together with those of its block that are equal to it."""
    small, kept = spec, _kept(spec)
    sizes = list(_sizes(spec.model_dump(mode="json")))
    done: set[Place] = set()
    for place, value in sizes:
        equal = [other for other, size in sizes if other[:-1] == place[:-1] and size == value]
        for together in ([place], equal):
            halved = None if done & set(together) else _changed(small, dict.fromkeys(together, half(value)))
            if halved is not None and _kept(halved) == kept:
                small = halved
                done |= set(together)
                break
    return small


def _sizes(data: Mapping[str, Any], path: Place = ()) -> Iterator[tuple[Place, int]]:
    """Every even number that is large enough to be a size, the widths of the stream first."""
    if not path:
        yield from [(("hidden_size",), data["hidden_size"])] * (data["hidden_size"] >= 2 * SMALLEST_WIDTH)
        data = {"blocks": data["blocks"]}
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, (*path, key))
        elif isinstance(value, int) and value >= 2 * SMALLEST_SIZE and value % 2 == 0:
            yield (*path, key), value


def _kept(spec: ModelSpec) -> dict[str, Traits]:
    """Traits of each block; a window by its being there, not by its size."""
    return {name: traits._replace(window=traits.window and 1) for name, traits in spec.traits().items()}


def _changed(spec: ModelSpec, changes: Mapping[Place, int]) -> ModelSpec | None:
    """`spec` with other numbers, or None where no model is like that."""
    data = spec.model_dump(mode="json")
    for place, value in changes.items():
        inside = data
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value
    try:
        return ModelSpec.model_validate(data)
    except (ValidationError, SpecError):
        return None
