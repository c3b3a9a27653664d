"""A row of the table, and how numbers and errors are said in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

Row = dict[str, Any]

Run = Callable[[], Any]

NOT_MEASURED = "not measured"


class Wrong(Exception):
    """A result that is too far from the formula to be worth timing."""


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, outputs before states."""
    return [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]


def rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON cannot say."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, Wrong) else f"{type(error).__name__}: {text[:300]}"
