"""What a rotary embedding costs: no matrix product, so bytes only. Torch-free."""

from archcompass.kernels.cost import Cost


def rotate_cost(*, batch: int, time: int, heads: int, head_dim: int, rotary_dim: int, element_bytes: int) -> Cost:
    """Every head read and written once, and one cosine and one sine (float32) per position and pair."""
    return Cost(
        flops=0,
        activation_bytes=2 * batch * time * heads * head_dim * element_bytes + time * rotary_dim * 4,
    )


EXAMPLE = {"batch": 1, "time": 4096, "heads": 32, "head_dim": 128, "rotary_dim": 128, "element_bytes": 2}


def alternatives(
    *, batch: int, time: int, heads: int, head_dim: int, rotary_dim: int, element_bytes: int
) -> dict[str, Cost]:
    """Work of each backend. The formula writes and reads the pairs, and the turned pairs, as complex numbers."""
    cost = rotate_cost(
        batch=batch, time=time, heads=heads, head_dim=head_dim, rotary_dim=rotary_dim, element_bytes=element_bytes
    )
    return {"triton": cost, "torch": cost, "reference": cost + Cost(0, 4 * 4 * batch * time * heads * rotary_dim)}
