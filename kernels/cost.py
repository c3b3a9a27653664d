"""What one call of an operation costs, whoever runs it: floating point operations and bytes moved.

Torch-free: `blocks/*/spec.py` and `profiles/` read the same functions that the kernels register as FLOP formulas, so
that one number has one home. Conventions, for every operation:

- a multiply-add counts as two FLOPs, and only matrix products and convolutions count; elementwise work is paid in
  bytes;
- FLOPs are those the algorithm really runs, so a chunked form counts the dense tiles inside a chunk;
- bytes are the least a machine must move: every input read once, every output written once, plus what the algorithm
  spills between its kernels.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Work of one forward call: `flops`, bytes of activations in and out, and bytes of state read and written."""

    flops: int
    activation_bytes: int
    state_bytes: int = 0

    def __add__(self, other: object) -> "Cost":
        """Field by field: the cost of running one after the other."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def ceil_div(value: int, divisor: int) -> int:
    """The number of blocks of size `divisor` that cover `value`."""
    return -(-value // divisor)
