"""What one call of an operation costs, whoever runs it: floating point operations and bytes moved.

Torch-free: `blocks/*/spec.py` and `profiles/` read the same functions that the kernels register as FLOP formulas, so
that one number has one home. Conventions, for every operation:

- a multiply-add counts as two FLOPs, and only matrix products and convolutions count; elementwise work is paid in
  bytes;
- FLOPs are those the algorithm really runs, so a chunked form counts the dense tiles inside a chunk;
- bytes are the least a machine must move: every input read once, every output written once, plus what the algorithm
  spills between its kernels.

Each operation's `alternatives` gives the work of each of its backends, where they differ, and `EXAMPLE` the sizes of one
call as models make it; `Machine` turns work into the least time it takes.
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


class Machine(NamedTuple):
    """What a device can do at best: FLOP/s of matrix products in the type of the call, and bytes/s of its memory."""

    flops_per_second: float
    bytes_per_second: float

    def milliseconds(self, cost: Cost) -> float:
        """The roofline: work takes at least as long as its products, and as its bytes."""
        moved = cost.activation_bytes + cost.state_bytes
        return 1e3 * max(cost.flops / self.flops_per_second, moved / self.bytes_per_second)


def repeated(cost: Cost, times: int) -> Cost:
    """The same work `times` times."""
    return Cost(*(times * amount for amount in cost))


def ceil_div(value: int, divisor: int) -> int:
    """The number of blocks of size `divisor` that cover `value`."""
    return -(-value // divisor)
