"""Names of nonlinearities, as HF configurations write them. Torch-free; `function` hands out the torch side."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"]

HF_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
}
"""Every spelling that HF's `hidden_act` knows, and ours."""


def function(name: Activation) -> "Callable[[Tensor], Tensor]":
    """The torch function called `name`."""
    from torch.nn import functional as F

    functions: dict[Activation, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "sigmoid": lambda x: x.sigmoid(),
    }
    return functions[name]
