"""What an RMS normalisation costs. Torch-free."""

from archcompass.kernels.cost import Cost


def rms_norm_cost(*, rows: int, width: int, element_bytes: int, residual: bool = False, gate: bool = False) -> Cost:
    """Cost of normalising `rows` rows of `width`: no matrix product, so no FLOPs; input, output and what else is read.

    A residual is read, and its sum written; a gate is read.
    """
    passes = 2 + 2 * residual + gate
    return Cost(0, rows * width * element_bytes * passes)


EXAMPLE = {"rows": 4096, "width": 4096, "element_bytes": 2, "residual": True}


def alternatives(
    *, rows: int, width: int, element_bytes: int, residual: bool = False, gate: bool = False
) -> dict[str, Cost]:
    """Work of each backend; the formula passes float32 through memory eight times: copy, squares, mean, two products."""
    cost = rms_norm_cost(rows=rows, width=width, element_bytes=element_bytes, residual=residual, gate=gate)
    return {"triton": cost, "torch": cost, "reference": cost + Cost(0, 8 * 4 * rows * width)}
