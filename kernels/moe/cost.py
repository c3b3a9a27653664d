"""What a mixture of experts costs, and how many experts a batch touches. Torch-free."""

from archcompass.kernels.cost import Cost


def moe_cost(
    *, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, gated: bool, element_bytes: int
) -> Cost:
    """The cost of running every token through its `top_k` of `experts` experts; router and shared experts apart.

    FLOPs: 2 hidden intermediate per matrix (three when gated, else two), per token and chosen expert. Activations:
    tokens in and out, and the inner activations written and read between the two grouped products. Weights are not
    activations: `expected_distinct_experts` says how many experts are read.
    """
    rows = tokens * min(top_k, experts)
    matrices = 3 if gated else 2
    return Cost(
        flops=2 * matrices * rows * hidden * intermediate,
        activation_bytes=(2 * tokens * hidden + 2 * rows * intermediate) * element_bytes,
    )


def expected_distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """E (1 - (1 - k/E)^t): experts that t tokens touch when each picks k of E evenly and independently."""
    return experts * (1.0 - (1.0 - min(top_k, experts) / experts) ** tokens)


EXAMPLE = {
    "tokens": 4096, "hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8, "gated": True, "element_bytes": 2,
}  # fmt: skip


def alternatives(
    *, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, gated: bool, element_bytes: int
) -> dict[str, Cost]:
    """Work of each backend, the experts' weights included. Torch writes the gathered rows, and the expert's rows before
    they are summed, and reads both; the formula reads each token's experts for this token alone."""
    cost = moe_cost(
        tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, gated=gated,
        element_bytes=element_bytes,
    )  # fmt: skip
    expert_bytes = (3 if gated else 2) * hidden * intermediate * element_bytes
    touched = round(expected_distinct_experts(experts, top_k, tokens))
    rows_bytes = 4 * tokens * min(top_k, experts) * hidden * element_bytes
    return {
        "triton": cost + Cost(0, touched * expert_bytes),
        "torch": cost + Cost(0, touched * expert_bytes + rows_bytes),
        "reference": cost + Cost(0, tokens * min(top_k, experts) * expert_bytes),
    }
