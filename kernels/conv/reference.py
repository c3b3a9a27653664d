"""The causal depthwise convolution as a formula: y_t = act(bias + sum_i w_i x_(t - width + 1 + i)), per channel."""

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, silu: bool) -> Tensor:
    """Runs the formula, in the dtype of x.

    Args:
        x: [batch, time, channels]; weight: [channels, width]; bias: [channels] or None.
        before: the width - 1 tokens before the first one, [batch, width - 1, channels].
        silu: whether the activation is SiLU rather than the identity.
    """
    time, width = x.shape[1], weight.shape[1]
    seen = torch.cat([before.to(x.dtype), x], dim=1)
    y = sum((seen[:, i : i + time] * weight[:, i] for i in range(width)), start=torch.zeros_like(x))
    if bias is not None:
        y = y + bias
    return F.silu(y) if silu else y
