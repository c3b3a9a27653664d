"""The diagonal linear recurrence token by token, in the precision it is given.

    h_t = exp(g_t) h_{t-1} + b_t

De et al. 2024 (Griffin, arXiv 2402.19427) run it with input-dependent decays, Peng et al. 2023 (RWKV-4, arXiv
2305.13048) with one constant decay per channel.
"""

import torch
from torch import Tensor


def reference(log_decay: Tensor, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the recurrence.

    Args:
        log_decay: g, [batch, time, channels] or, to share it, [batch, time, 1, channels].
        inputs: b, [batch, time, channels] or [batch, time, rows, channels].
        state: h before the first token, like one token of the inputs.

    Returns:
        h after every token, like the inputs, and after the last.
    """
    forget = log_decay.exp()
    seen = []
    for t in range(inputs.shape[1]):
        state = forget[:, t] * state + inputs[:, t]
        seen.append(state)
    return (torch.stack(seen, dim=1) if seen else torch.empty_like(inputs)), state
