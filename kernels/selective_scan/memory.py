"""What the selective scan keeps in memory beside its inputs. Torch-free; see `archcompass.kernels.held`."""

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.held import Held
from archcompass.kernels.selective_scan.tiles import KEEP_EVERY

BLOCK = 16
"""Tokens between kept states of the torch form (as in blocked.py)."""


def selective_scan_held(
    *, batch: int, new_tokens: int, channels: int, state_dim: int, element_bytes: int, fused: bool = True
) -> Held:
    """Arguments as in `selective_scan_cost`; `fused` when Triton kernels run it. Skip and gate are part of the operation.

    The torch form casts x and dt to float32, and works through blocks of tokens with a decay and a state for every one of
    them, the last block's still at hand. Autograd keeps the state at each block's start; backward, a block has six of its
    arrays beside the gradients of x, dt and the result.
    """
    sequence, state = batch * new_tokens * channels, batch * channels * state_dim
    if fused or new_tokens <= 1:
        starts = 4.0 * ceil_div(new_tokens, KEEP_EVERY) * state
        moved = sequence * element_bytes
        return Held(moved + 4.0 * state, starts + 2 * moved, 3.0 * moved)
    cast = 4 * sequence if element_bytes < 4 else 0
    starts = 4.0 * ceil_div(new_tokens, BLOCK) * state
    blocks = 4.0 * min(new_tokens, BLOCK) * state
    peak, saved = 2 * cast + 8 * sequence + 4 * blocks + 8 * state, 12 * sequence + 4 * cast + starts
    return Held(peak, saved, 12 * sequence + 6 * blocks)
