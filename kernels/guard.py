"""Where the kernels of an operator run: on the GPU of its tensors, which need not be the current one."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_its_device(body: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs the body of an operator with the GPU of its first tensor as the current one.

    Triton launches on the current GPU and its current stream, whatever the arguments say. Torch switches for its own
    operators, not for those written in Python.
    """

    @wraps(body)
    def there(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device_of(first):
            return body(*args, **kwargs)

    return there
