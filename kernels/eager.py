"""What a decoding step leaves out on a CPU: wrapping a call as an operator takes fifty microseconds, like a small step."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def plain_call(*tensors: Tensor | None) -> bool:
    """Whether nobody needs to see a call as one operator: no gradient, no compiler, no fake tensors, no counter.

    A mode that says `looks_on` wants to see what runs without it, operation by operation.
    """
    if torch.compiler.is_compiling():
        return False
    mode = _get_current_dispatch_mode()
    if mode is not None and not getattr(mode, "looks_on", False):
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Each in `dtype`. Asking torch for a conversion that changes nothing takes half as long as a small operation."""
    return [x if x.dtype is dtype else x.to(dtype) for x in tensors]
