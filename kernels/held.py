"""What an operation keeps in memory beside its inputs, by the form that runs. Torch-free.

Fused forms (Triton) keep what they pass between kernels; the torch forms, a processor's path, keep every intermediate that a
line of theirs makes, and autograd keeps most of those for the backward pass. The numbers of the torch forms are counts of
tensors, read off the code in `chunked.py` and its like and held to what an allocator sees (benchmarks/memory.py).
"""

from typing import NamedTuple


class Held(NamedTuple):
    """Bytes beside the inputs: the most alive at once in a forward call, output included; what a backward pass needs; and the
    most it has alive beyond that, gradients of outputs and inputs on their way."""

    peak_bytes: float
    saved_bytes: float
    backward_bytes: float = 0.0
