"""RMS normalisation as a formula (Zhang and Sennrich 2019), gated before (Mamba-2) or after (Gated DeltaNet)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Rule(NamedTuple):
    """Everything about a call but its tensors; fields as `rms_norm`, `group_size` being the width where it had none."""

    eps: float
    gate_first: bool
    gate_activation: str
    group_size: int
    unit_offset: bool


def reference(x: Tensor, gate: Tensor | None, weight: Tensor | None, rule: Rule) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w over groups of `group_size`, everything in the dtype of x.

    Args:
        x: [..., width]; gate: like x, or None; weight: [width] or None.
    """
    opened = None if gate is None else ACTIVATIONS[rule.gate_activation](gate)
    if opened is not None and rule.gate_first:
        x = x * opened
    groups = x.unflatten(-1, (-1, rule.group_size))
    y: Tensor = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + rule.eps)).flatten(-2)
    if weight is not None:
        y = y * (1 + weight if rule.unit_offset else weight)
    return y if opened is None or rule.gate_first else y * opened
