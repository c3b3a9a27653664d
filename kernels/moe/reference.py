"""A mixture of experts as its definition: every token, one chosen expert after the other (Shazeer et al. 2017, arXiv
1701.06538, equation 1)."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from archcompass.kernels.moe.activations import Activation


def moe_reference(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    scale_input: bool,
) -> Tensor:
    """y_t = Σ_k w_tk expert_k(x_t), or with `scale_input` Σ_k expert_k(w_tk x_t). Shapes as `moe_mlp`."""
    rows = []
    for token, weight, chosen in zip(x, weights.to(x.dtype), experts.tolist(), strict=True):
        total = torch.zeros_like(token)
        for w, expert in zip(weight, chosen, strict=True):
            inner = linear(token * w if scale_input else token, gate_up[expert], _row(gate_up_bias, expert))
            y = linear(activation(inner), down[expert], _row(down_bias, expert))
            total = total + (y if scale_input else w * y)
        rows.append(total)
    return torch.stack(rows) if rows else x.clone()


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
