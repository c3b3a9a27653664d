"""The causal depthwise convolution in plain torch: shifted multiply-adds over blocks of time that stay in the cache.

A depthwise `conv1d` wants [batch, channels, time]; here time comes before the channels, and two transposes of the
whole input would cost more than the convolution. Sums are float32 whatever the input is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_TOKENS = 128


def forward(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolves x, [batch, time, channels], that follows on `before`, [batch, width - 1, channels]."""
    dtype, past = sum_dtype(x), before.shape[1]
    taps = weight.to(dtype).t().contiguous()
    start = x.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
    time = x.shape[1]
    block = max(past, BLOCK_TOKENS) if x.device.type == "cpu" else max(time, 1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for first in range(0, time, block):
        last = min(first + block, time)
        seen = x[:, first - past : last] if first else torch.cat([before, x[:, :last]], dim=1)
        here = out[:, first:last]
        y = convolve(seen.to(dtype), taps, start, out=here if out.dtype == dtype else None)
        y = F.silu(y, inplace=True) if silu else y
        if y.dtype != out.dtype:
            here.copy_(y)
    return out


def convolve(seen: Tensor, taps: Tensor, start: Tensor, out: Tensor | None = None) -> Tensor:
    """start + sum_i taps_i seen_(t + i), written to `out` if given; taps [width, channels]."""
    time = seen.shape[1] - taps.shape[0] + 1
    y = torch.addcmul(start, seen[:, :time], taps[0], out=out)
    for i in range(1, taps.shape[0]):
        y.addcmul_(seen[:, i : i + time], taps[i])
    return y


def step(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One token, [batch, 1, channels], and the tokens it leaves: few operations, and no operator around them."""
    dtype, seen = sum_dtype(x), torch.cat([before, x], dim=1)
    y = (seen * weight.t().to(dtype)).sum(1, keepdim=True)
    y = y if bias is None else y + bias
    return (F.silu(y) if silu else y).to(x.dtype), seen[:, 1:]


def backward(
    grad: Tensor, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to x, `before`, `weight` and `bias` (of a zero bias where there is none)."""
    width, past, time = weight.shape[1], before.shape[1], grad.shape[1]
    dtype = sum_dtype(x)
    taps, seen, slope = weight.to(dtype).t(), torch.cat([before, x], dim=1).to(dtype), grad.to(dtype)
    if silu:
        y = convolve(seen, taps, seen.new_zeros(()) if bias is None else bias.to(dtype))
        gate = torch.sigmoid(y)
        slope = slope * gate * (1 + y * (1 - gate))
    d_seen = torch.zeros_like(seen)
    for i in range(width):
        d_seen[:, i : i + time].addcmul_(slope, taps[i])
    d_weight = torch.stack([(seen[:, i : i + time] * slope).sum((0, 1)) for i in range(width)], dim=1)
    d_before, d_x = d_seen.to(x.dtype).split([past, time], dim=1)
    return d_x.clone(), d_before.clone(), d_weight.to(weight.dtype), slope.sum((0, 1)).to(weight.dtype)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums are float32, float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
