"""The causal depthwise convolution in plain torch: shifted multiply-adds over blocks of time that stay in the cache.

A depthwise `conv1d` wants [batch, channels, time]; here time comes before the channels, and two transposes of the
whole input would cost more than the convolution. Sums are float32 whatever the input is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_TOKENS = 128


def forward(seen: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolves `seen` [batch, width - 1 + time, channels] to [batch, time, channels], in the dtype of `seen`."""
    width = weight.shape[1]
    time = seen.shape[1] - width + 1
    dtype = sum_dtype(seen)
    taps = weight.to(dtype).t().contiguous()
    start = seen.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
    block = BLOCK_TOKENS if seen.device.type == "cpu" else max(time, 1)
    if time <= block:
        return _block(seen, taps, start, silu)
    out = seen.new_empty(seen.shape[0], time, seen.shape[2])
    for first in range(0, time, block):
        last = min(first + block, time)
        out[:, first:last] = _block(seen[:, first : last + width - 1], taps, start, silu)
    return out


def _block(seen: Tensor, taps: Tensor, start: Tensor, silu: bool) -> Tensor:
    wide = seen.to(taps.dtype)
    y = convolve(wide, taps, start)
    return (F.silu(y, inplace=True) if silu else y).to(seen.dtype)


def convolve(seen: Tensor, taps: Tensor, start: Tensor) -> Tensor:
    """start + sum_i taps_i seen_(t + i); taps [width, channels]."""
    time = seen.shape[1] - taps.shape[0] + 1
    y = torch.addcmul(start, seen[:, :time], taps[0])
    for i in range(1, taps.shape[0]):
        y.addcmul_(seen[:, i : i + time], taps[i])
    return y


def backward(
    grad: Tensor, seen: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to `seen`, `weight` and `bias` (of a zero bias where there is none)."""
    width = weight.shape[1]
    time = grad.shape[1]
    dtype = sum_dtype(seen)
    taps, wide, slope = weight.to(dtype).t(), seen.to(dtype), grad.to(dtype)
    if silu:
        y = convolve(wide, taps, wide.new_zeros(()) if bias is None else bias.to(dtype))
        gate = torch.sigmoid(y)
        slope = slope * gate * (1 + y * (1 - gate))
    d_seen = torch.zeros_like(wide)
    for i in range(width):
        d_seen[:, i : i + time].addcmul_(slope, taps[i])
    d_weight = torch.stack([(wide[:, i : i + time] * slope).sum((0, 1)) for i in range(width)], dim=1)
    return d_seen.to(seen.dtype), d_weight.to(weight.dtype), slope.sum((0, 1)).to(weight.dtype)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums are float32, float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
