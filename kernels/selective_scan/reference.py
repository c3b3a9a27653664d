"""The selective scan token by token, as the paper prints it (Gu and Dao 2023, arXiv 2312.00752, algorithm 2)."""

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t · h_t, in the precision of `state`.

    Shapes as in `archcompass.kernels.selective_scan.selective_scan`; the skip and the gate are the caller's.
    """
    out_like = x
    x, dt, A, B, C = (tensor.to(state.dtype) for tensor in (x, dt, A, B, C))
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t].unsqueeze(-1)
        state = (step * A).exp() * state + step * B[:, t].unsqueeze(1) * x[:, t].unsqueeze(-1)
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    if not outputs:
        return out_like.new_empty(out_like.shape), state
    return torch.stack(outputs, dim=1).to(out_like.dtype), state
