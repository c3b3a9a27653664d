"""What the selective scan of Mamba-1 costs.

Torch-free. Only the readout C_t · h_t is a product, so FLOPs count 2 N per channel and token; the recurrence itself is
elementwise: one exponential and about seven operations per channel, state entry and token, in no counter's books. On
machines with few special function units those exponentials, `batch · new_tokens · channels · state_dim` of them, set
the speed (an H100 reaches its limit there before it reaches its bandwidth), so a model of time should ask for
`exponentials` too.
"""

from typing import Any

from archcompass.kernels.cost import Cost, repeated

STATE_ELEMENT_BYTES = 4


def selective_scan_cost(
    *, batch: int, new_tokens: int, channels: int, state_dim: int, element_bytes: int, gated: bool = True
) -> Cost:
    """One forward call of `selective_scan` on `batch` sequences of `new_tokens` tokens.

    Args:
        channels: inner width of the block, D.
        state_dim: N, state entries per channel.
        element_bytes: bytes of one element of x, dt, B, C, the gate and the output.
        gated: whether y is multiplied by silu(gate), whose input is then read too.
    """
    tokens = batch * new_tokens
    streams = 4 if gated else 3
    activation_bytes = tokens * element_bytes * (streams * channels + 2 * state_dim)
    state = batch * channels * state_dim
    state_bytes = 2 * state * STATE_ELEMENT_BYTES if new_tokens else 0
    return Cost(2 * state * new_tokens, activation_bytes, state_bytes)


def exponentials(*, batch: int, new_tokens: int, channels: int, state_dim: int) -> int:
    """Exponentials of one forward call: one per channel, state entry and token."""
    return batch * new_tokens * channels * state_dim


EXAMPLE = {"batch": 1, "new_tokens": 4096, "channels": 5120, "state_dim": 16, "element_bytes": 2}


def alternatives(*, new_tokens: int, **sizes: Any) -> dict[str, Cost]:
    """Work of each backend, sizes as `selective_scan_cost`; the formula is as many single steps as there are tokens."""
    cost = selective_scan_cost(new_tokens=new_tokens, **sizes)
    steps = repeated(selective_scan_cost(new_tokens=1, **sizes), new_tokens)
    return {"triton": cost, "torch": cost, "reference": steps}
