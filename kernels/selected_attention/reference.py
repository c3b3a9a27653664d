"""Attention over selected keys as its definition: a softmax over all keys of which only the selected ones count."""

import torch
from torch import Tensor


def selected_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Shapes as `selected_attention`; a key selected twice counts twice."""
    share = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthd,bkhd->bthk", q, k.repeat_interleave(share, 2)) * scale
    chosen = scores.gather(-1, index.repeat_interleave(share, 2))
    weights = chosen.masked_fill(~counts.repeat_interleave(share, 2), float("-inf")).softmax(-1).nan_to_num(0.0)
    times = torch.zeros_like(scores).scatter_add(-1, index.repeat_interleave(share, 2), weights)
    return torch.einsum("bthk,bkhd->bthd", times, v.repeat_interleave(share, 2)), weights
