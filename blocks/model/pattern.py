"""The compact pattern of a model's layers, and what it stands for.

    pattern := part ("|" part)*          layers, one after another
    part    := [count "*"] "(" pattern ")"
             | name+                     one layer: its residual sublayers, in order

`"32*(attention mlp)"` is Llama; `"4*(mamba mlp | mamba moe | mamba mlp | mamba moe | attention mlp | mamba moe | mamba mlp |
mamba moe)"` is Jamba; `"mamba | mlp | mamba | mlp | attention | mlp"` has one sublayer a layer, as Nemotron-H. Depth is
derived, never stored.
"""

import re
from functools import lru_cache

from archcompass.errors import SpecError

Layer = tuple[str, ...]
"""The names of one layer's residual sublayers."""

MAX_LAYERS = 4096

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_-]*)|(?P<count>\d+)|(?P<sign>[|*()]))")


@lru_cache(maxsize=4096)
def expand(pattern: str) -> tuple[Layer, ...]:
    """All layers that `pattern` stands for, in order.

    Raises:
        SpecError: the pattern does not follow the grammar, is empty, or stands for more than 4096 layers.
    """
    tokens = _tokens(pattern)
    layers, rest = _sequence(pattern, tokens, 0)
    if rest != len(tokens):
        raise SpecError(f"layers is {pattern!r}: {tokens[rest]!r} has no place there")
    return tuple(layers)


def compress(layers: tuple[Layer, ...]) -> str:
    """The shortest pattern this module finds for `layers`; `expand` gives them back."""
    if not layers:
        raise SpecError("layers is empty: a model has at least one layer")
    return _shortest(layers)


def _tokens(pattern: str) -> list[str]:
    tokens, at, text = [], 0, pattern.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise SpecError(f"layers is {pattern!r}: cannot read {text[at : at + 12].strip()!r}")
        tokens.append(match.group().strip())
        at = match.end()
    if not tokens:
        raise SpecError("layers is empty: name at least one block, as in '12*(attention mlp)'")
    return tokens


def _sequence(pattern: str, tokens: list[str], at: int, depth: int = 0) -> tuple[list[Layer], int]:
    if depth > 8:
        raise SpecError(f"layers is {pattern[:60]!r}...: more than 8 brackets deep")
    layers: list[Layer] = []
    while True:
        part, at = _part(pattern, tokens, at, depth)
        layers += part
        if len(layers) > MAX_LAYERS:
            raise SpecError(f"layers stands for more than {MAX_LAYERS} layers")
        if at == len(tokens) or tokens[at] != "|":
            return layers, at
        at += 1


def _part(pattern: str, tokens: list[str], at: int, depth: int) -> tuple[list[Layer], int]:
    count = 1
    if at + 1 < len(tokens) and tokens[at].isdigit() and tokens[at + 1] == "*":
        count, at = int(tokens[at]), at + 2
        if not 1 <= count <= MAX_LAYERS:
            raise SpecError(f"layers is {pattern!r}: repeat count {count} must lie between 1 and {MAX_LAYERS}")
        if at == len(tokens) or tokens[at] != "(":
            raise SpecError(f"layers is {pattern!r}: a repeat count is followed by '(', as in '4*(attention mlp)'")
    if at < len(tokens) and tokens[at] == "(":
        inner, at = _sequence(pattern, tokens, at + 1, depth + 1)
        if at == len(tokens) or tokens[at] != ")":
            raise SpecError(f"layers is {pattern!r}: a '(' is never closed")
        if len(inner) * count > MAX_LAYERS:
            raise SpecError(f"layers stands for more than {MAX_LAYERS} layers")
        return inner * count, at + 1
    names = []
    while at < len(tokens) and tokens[at] not in "|*()" and not tokens[at].isdigit():
        names.append(tokens[at])
        at += 1
    if not names:
        found = repr(tokens[at]) if at < len(tokens) else "the end"
        raise SpecError(f"layers is {pattern!r}: expected a block name before {found}")
    return [tuple(names)], at


@lru_cache(maxsize=4096)
def _shortest(layers: tuple[Layer, ...]) -> str:
    """Greedy run-length coding over periods: from each position, the repeat that covers the most."""
    parts, at = [], 0
    while at < len(layers):
        period, times = _best_repeat(layers, at)
        unit = layers[at : at + period]
        inner = " ".join(unit[0]) if period == 1 else _shortest(unit)
        parts.append(f"{times}*({inner})" if times > 1 else inner)
        at += period * times
    return " | ".join(parts)


def _best_repeat(layers: tuple[Layer, ...], at: int) -> tuple[int, int]:
    best = (1, 1)
    for period in range(1, (len(layers) - at) // 2 + 1):
        times = 1
        while layers[at + times * period : at + (times + 1) * period] == layers[at : at + period]:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best
