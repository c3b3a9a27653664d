"""What an RMS normalisation costs. Torch-free."""

from archcompass.kernels.cost import Cost


def rms_norm_cost(*, rows: int, width: int, element_bytes: int, residual: bool = False, gate: bool = False) -> Cost:
    """Cost of normalising `rows` rows of `width`: no matrix product, so no FLOPs; input, output and what else is read.

    A residual is read, and its sum written; a gate is read.
    """
    passes = 2 + 2 * residual + gate
    return Cost(0, rows * width * element_bytes * passes)
