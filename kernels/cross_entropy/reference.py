"""Cross entropy of a linear head as two formulas: logits = scale cap(h Wᵀ), loss = logsumexp(logits) - logits[target]."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    soft_cap: float | None,
    scale: float,
    reduction: str,
) -> Tensor:
    """torch's cross entropy on all logits at once; the mean over no target at all is 0, not NaN."""
    logits = (hidden @ weight.t()) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    losses = cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else losses.sum()
