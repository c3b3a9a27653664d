"""The first difference between two models, by field: what an export lost."""

from __future__ import annotations

from typing import Any

from archcompass.blocks.model.spec import ModelSpec

_OVERALL = ("blocks", "layers", "residuals", "residual", "name", "model_type", "shared")


def differences(ours: ModelSpec, theirs: ModelSpec) -> list[str]:
    """Where `theirs` says something else than `ours`; names of blocks, and equal blocks under two names, do not count."""
    found = []
    mine, yours = ours.model_dump(mode="json"), theirs.model_dump(mode="json")
    for key in mine:
        if key not in _OVERALL:
            found += _compare(key, mine[key], yours[key])
    if ours.num_hidden_layers != theirs.num_hidden_layers:
        return [*found, f"num_hidden_layers is {ours.num_hidden_layers}, there {theirs.num_hidden_layers}"]
    seen: set[tuple[str, str]] = set()
    for depth, (names, other) in enumerate(zip(ours.expanded, theirs.expanded, strict=True)):
        if len(names) != len(other):
            found.append(f"layer {depth} has {len(names)} sublayers ({' '.join(names)}), there {len(other)}")
            continue
        for pair in zip(names, other, strict=True):
            if pair not in seen:
                seen.add(pair)
                found += _sublayer(ours, theirs, *pair)
    return found


def _sublayer(ours: ModelSpec, theirs: ModelSpec, name: str, other: str) -> list[str]:
    mine, yours = ours.blocks[name], theirs.blocks[other]
    if mine.kind != yours.kind:
        return [f"blocks.{name} is a {mine.kind}, there a {yours.kind}"]
    found = _compare(f"blocks.{name}", mine.model_dump(mode="json"), yours.model_dump(mode="json"))
    joined, other_joined = (spec.residual_of(key) for spec, key in ((ours, name), (theirs, other)))
    found += _compare(f"residual of {name}", joined.model_dump(mode="json"), other_joined.model_dump(mode="json"))
    if (name in ours.shared) != (other in theirs.shared):
        found.append(f"{name} is {'' if name in ours.shared else 'not '}shared, there it is otherwise")
    return found


def _compare(where: str, mine: Any, yours: Any) -> list[str]:
    if isinstance(mine, dict) and isinstance(yours, dict):
        keys = [*mine, *(key for key in yours if key not in mine)]
        return [hit for key in keys for hit in _compare(f"{where}.{key}", mine.get(key), yours.get(key))]
    return [] if mine == yours else [f"{where} is {mine!r}, there {yours!r}"]
