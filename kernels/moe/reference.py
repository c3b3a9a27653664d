"""A mixture of experts as its definition: every token, one chosen expert after the other (Shazeer et al. 2017, arXiv
1701.06538, equation 1)."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from archcompass.kernels.moe.activations import Experts


def moe_reference(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """y_t = Σ_k w_tk expert_k(x_t), or with `scale_input` Σ_k expert_k(w_tk x_t). Shapes as `moe_mlp`."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    rows = []
    for token, weight, own in zip(x, weights.to(x.dtype), chosen.tolist(), strict=True):
        total = torch.zeros_like(token)
        for w, expert in zip(weight, own, strict=True):
            inner = linear(token * w if experts.scale_input else token, gate_up[expert], _row(gate_up_bias, expert))
            y = linear(experts.activation(inner), down[expert], _row(down_bias, expert))
            total = total + (y if experts.scale_input else w * y)
        rows.append(total)
    return torch.stack(rows) if rows else x.clone()


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
