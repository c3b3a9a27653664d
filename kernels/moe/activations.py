"""Experts as one argument: their matrices, what they do between them, and the derivative of that.

An activation maps the first product [rows, 2 I] (gate, then up) or [rows, I] (without gate) to [rows, I].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from archcompass.errors import InputError


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _relu2_derivative(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 2 * torch.relu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_tanh_derivative(grad: Tensor, x: Tensor) -> Tensor:
    derivative: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return derivative


# name: (function, its vector-Jacobian product)
POINTWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (torch.nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu": (torch.nn.functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_derivative),
    "relu": (torch.relu, lambda grad, x: grad * (x > 0)),
    "relu2": (_relu2, _relu2_derivative),
}


@dataclass(frozen=True, slots=True)
class Activation:
    """f(gate) up with a gate, f(x) without.

    `name` is one of POINTWISE, or "swish" for sigmoid(alpha x) x. With `limit`, gate is clamped to at most `limit` and
    up to ±limit before. `up_offset` is added to up. gpt-oss is Activation("swish", alpha=1.702, limit=7, up_offset=1).
    """

    name: str
    gated: bool
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in POINTWISE and self.name != "swish":
            raise InputError(f"activation is {self.name!r}; choose one of {', '.join((*POINTWISE, 'swish'))}")
        if not self.gated and (self.limit is not None or self.up_offset):
            raise InputError(f"limit is {self.limit} and up_offset {self.up_offset} with gated=False; they need a gate")

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, 2 I] or, without a gate, [rows, I] to [rows, I]."""
        if not self.gated:
            return self._pointwise(x)
        gate, up = self._clamped(x)
        return self._pointwise(gate) * (up + self.up_offset if self.up_offset else up)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, given that of the result."""
        if not self.gated:
            return self._pointwise_backward(grad, x)
        gate, up = self._clamped(x)
        result = torch.empty_like(x)
        d_gate, d_up = result.chunk(2, dim=-1)
        d_gate.copy_(self._pointwise_backward(grad * (up + self.up_offset if self.up_offset else up), gate))
        torch.mul(grad, self._pointwise(gate), out=d_up)
        if self.limit is not None:
            raw_gate, raw_up = x.chunk(2, dim=-1)
            d_gate *= raw_gate <= self.limit
            d_up *= raw_up.abs() <= self.limit
        return result

    def _clamped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, dim=-1)
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)

    def _pointwise(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.alpha * x) if self.name == "swish" else POINTWISE[self.name][0](x)

    def _pointwise_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.name != "swish":
            return POINTWISE[self.name][1](grad, x)
        gate = torch.sigmoid(self.alpha * x)
        return grad * gate * (1 + self.alpha * x * (1 - gate))


@dataclass(frozen=True, slots=True)
class Experts:
    """What all paths take beside the tokens and their routing. Shapes as `moe_mlp`."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    scale_input: bool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As operators of torch take them."""
        return self.gate_up, self.down, self.gate_up_bias, self.down_bias

    def settings(self) -> tuple[str, bool, float, float | None, float, bool]:
        """As operators of torch take them."""
        act = self.activation
        return act.name, act.gated, act.alpha, act.limit, act.up_offset, self.scale_input


def experts_of(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
    scale_input: bool,
) -> Experts:
    """The inverse of `tensors` and `settings`."""
    act = Activation(activation, gated, alpha, limit, up_offset)
    return Experts(gate_up, down, gate_up_bias, down_bias, act, scale_input)
