"""What the diagonal recurrence keeps in memory beside its inputs. Torch-free; see `archcompass.kernels.held`."""

from archcompass.kernels.held import Held


def diagonal_scan_held(*, batch: int, new_tokens: int, channels: int, rows: int = 1, fused: bool = True) -> Held:
    """Arguments as in `diagonal_scan_cost`; `fused` when Triton kernels run it. All tensors are float32.

    The torch form works on chunks of about √T tokens, which it stacks and adds to.
    """
    decays = 4.0 * batch * new_tokens * channels
    inputs = decays * rows
    if fused or new_tokens <= 1:
        return Held(inputs, inputs, inputs + decays)
    return Held(2 * decays + 3 * inputs, 4 * decays + 2 * inputs, inputs + decays)
