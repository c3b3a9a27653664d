"""RMS normalisation as a formula (Zhang and Sennrich 2019), gated before (Mamba-2) or after (Gated DeltaNet)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    gate_first: bool,
    gate_activation: str,
    group_size: int,
    unit_offset: bool,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w over groups of `group_size`, everything in the dtype of x.

    Args:
        x: [..., width]; weight: [width] or None; gate: like x, or None.
    """
    opened = None if gate is None else ACTIVATIONS[gate_activation](gate)
    if opened is not None and gate_first:
        x = x * opened
    groups = x.unflatten(-1, (-1, group_size))
    y: Tensor = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * (1 + weight if unit_offset else weight)
    return y if opened is None or gate_first else y * opened
