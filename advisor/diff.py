"""What changed between two answers: the question, the family, the sizes, memory and speed; small differences are left out."""

from __future__ import annotations

from typing import Any

Data = dict[str, Any]

LEAST_SHARE = 0.005
"""Numbers that differ by less are the same to a reader."""

FIGURES = {
    "parameters": ("parameters", "total"),
    "active parameters": ("parameters", "active"),
    "memory_bytes": ("memory", "total_bytes"),
    "first token_ms": ("speed", "ttft_ms"),
    "per token_ms": ("speed", "decode_ms_per_token"),
}


def changes(before: Data, after: Data) -> list[Data]:
    """Rows of {what, before, after, change}, the question's first."""
    rows = _rows("workload", before["workload"], after["workload"])
    rows += _rows("", *({key: data[key] for key in ("family", "confidence")} for data in (before, after)))
    rules = [{rule["rule"]: rule["strength"] for rule in data["rules"]} for data in (before, after)]
    rows += _rows("rule", *rules)
    candidates = [{c["family"]: c for c in data["candidates"]} for data in (before, after)]
    for family in candidates[0]:
        if family in candidates[1]:
            rows += _rows(family, _facts(candidates[0][family]), _facts(candidates[1][family]))
    return rows


def _facts(candidate: Data) -> Data:
    figures = {name: (candidate.get(group) or {}).get(key) for name, (group, key) in FIGURES.items()}
    return {key: candidate[key] for key in ("rank", "fits", "precision", "name")} | figures


def _rows(where: str, before: Data, after: Data) -> list[Data]:
    return [
        {"what": f"{where} {key}".strip(), "before": one, "after": other, "change": _change(one, other)}
        for key in dict.fromkeys([*before, *after])
        for one, other in [(before.get(key), after.get(key))]
        if not _same(one, other)
    ]


def _same(one: Any, other: Any) -> bool:
    if _is_number(one) and _is_number(other):
        return bool(abs(one - other) <= LEAST_SHARE * max(abs(one), abs(other)))
    return bool(one == other)


def _change(one: Any, other: Any) -> str:
    if not (_is_number(one) and _is_number(other)) or not one:
        return ""
    return f"{(other - one) / abs(one):+.1%}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
