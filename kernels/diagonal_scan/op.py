"""The public face of the diagonal recurrence: checks, choice of backend."""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.diagonal_scan.chunked import chunked
from archcompass.kernels.diagonal_scan.reference import reference
from archcompass.kernels.dispatch import Backend, Choice, choose

OPERATION = "diagonal_scan"


def diagonal_scan(
    log_decay: Tensor,
    inputs: Tensor,
    *,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """A linear recurrence in every channel by itself, over whole sequences, further segments or single tokens.

        h_t = exp(g_t) h_{t-1} + b_t

    Args:
        log_decay: g, [batch, time, channels], at most 0 but for rounding; minus infinity starts anew.
        inputs: b, [batch, time, channels], or [batch, time, rows, channels] for several recurrences of one decay.
        initial_state: h before the first token, [batch, channels] or [batch, rows, channels]; None is zero.
        backend: "auto", or the implementation to use.
        strict: with "auto", refuse to fall back from the fastest backend of the device.

    Returns:
        h after every token, like the inputs, and after the last, like the initial state; both float32, float64 for
        float64 inputs.

    Raises:
        InputError: shapes that do not belong together.
        BackendError: the backend cannot run here.
    """
    if inputs.dim() not in (3, 4) or log_decay.shape != (*inputs.shape[:2], inputs.shape[-1]):
        raise InputError(
            f"log_decay {list(log_decay.shape)} and inputs {list(inputs.shape)} must be [batch, time, channels] and "
            "[batch, time, (rows,) channels]"
        )
    wide = torch.promote_types(inputs.dtype, torch.float32)
    shape = (inputs.shape[0], *inputs.shape[2:])
    state = inputs.new_zeros(shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    if state.shape != shape:
        raise InputError(f"initial_state has shape {list(state.shape)}; it must be {list(shape)}")
    choice = explain(inputs, backend=backend, strict=strict)
    if inputs.shape[1] == 0:
        return inputs.to(wide), state.clone()
    log_decay, inputs = log_decay.to(wide), inputs.to(wide)
    if choice.backend == "triton":
        from archcompass.kernels.diagonal_scan.triton_scan import diagonal_scan_triton

        return diagonal_scan_triton(log_decay, inputs, state)
    run = reference if choice.backend == "reference" else chunked
    return run(log_decay.unsqueeze(2) if inputs.dim() == 4 else log_decay, inputs, state)


def explain(inputs: Tensor, *, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with these inputs, and why."""
    refusals = {"triton": "the kernel keeps the state in float32, and the inputs are float64"}
    wide = inputs.dtype == torch.float64
    return choose(OPERATION, backend, inputs.device, refusals=refusals if wide else {}, strict=strict)
