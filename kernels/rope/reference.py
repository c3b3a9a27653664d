"""Rotary position embedding as complex numbers (Su et al. 2021, arXiv 2104.09864, equation 12)."""

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Multiplies the pair (a, b) = a + ib of each position by cos + i sin.

    Pairs are (2i, 2i+1) when interleaved, else (i, i + R/2), over the first R = 2 cos.shape[-1] dimensions; the others
    pass. Computed in float64 or in float32 and rounded once.
    """
    half = cos.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turned, passed = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    pairs = torch.unflatten(turned, -1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    angle = torch.complex(cos.to(wide), sin.to(wide)).unsqueeze(-2)
    result = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * angle)
    result = result if interleaved else result.transpose(-1, -2)
    return torch.cat((result.flatten(-2).to(x.dtype), passed), dim=-1)
