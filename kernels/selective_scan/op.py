"""The public face of the selective scan: checks, choice of backend, packed sequences, skip and gate."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from archcompass.errors import InputError
from archcompass.kernels.decay import LOG2_E
from archcompass.kernels.dispatch import Backend, Choice, choose, settled
from archcompass.kernels.eager import cast
from archcompass.kernels.packed import over_sequences, same_shape, sequences
from archcompass.kernels.selective_scan.blocked import selective_scan_torch
from archcompass.kernels.selective_scan.reference import selective_scan_reference
from archcompass.kernels.selective_scan.tiles import WIDEST_STATE

OPERATION = "selective_scan"


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state space scan of Mamba-1, one decay per channel and state entry.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (C_t · h_t + D x_t) silu(gate_t)

    Domain: dt at least 0 and A at most 0, so that no factor exceeds 1; the step is exact at any size of dt A. A negative
    dt, which no softplus gives, is not looked for: it makes states grow as the formula says.

    Args:
        x: [batch, time, channels], after convolution and activation.
        dt: [batch, time, channels], after softplus.
        A: [channels, N], negative.
        B: [batch, time, N]; C: likewise.
        D: skip, [channels], or None.
        gate: z, [batch, time, channels], or None.
        initial_state: [batch, channels, N] (one per sequence when packed); None is zero.
        cu_seqlens: boundaries of packed sequences, [sequences + 1], from 0 to time; the batch must be 1.
        backend: "auto", or the implementation to use.
        strict: with "auto", refuse to fall back from the fastest backend of the device.

    Returns:
        y [batch, time, channels] in the dtype of x, and the state after the last token of every sequence,
        [batch or sequences, channels, N], float32 (float64 for float64 inputs).

    Raises:
        InputError: shapes that do not belong together, or an A that is positive somewhere (seen on the CPU only).
        BackendError: the backend cannot run here.
    """
    _check(x, dt, A, B, C, D, gate)
    chosen = explain(x, A, backend=backend, strict=strict).backend
    if chosen == "triton" and x.numel():
        return _triton(x, dt, A, B, C, D, gate, initial_state, cu_seqlens)
    run = partial(_core, A, chosen)
    y, state = over_sequences(run, (x, dt, B, C), x, A.shape, initial_state, cu_seqlens)
    return _finished(y, x, D, gate), state


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor,
    gate: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token per sequence, for decoding: `selective_scan` without its time axis.

    Args:
        x, dt, gate: [batch, channels].
        B, C: [batch, N].
        state: [batch, channels, N]. With gradients disabled it is overwritten and returned.
        backend: "auto", or the implementation to use; "reference" is the same code as "torch".

    Returns:
        y [batch, channels] in the dtype of x, and the new state.

    Raises:
        BackendError: the backend cannot run here, or has no gradients and they are wanted.
    """
    if not settled(backend, x) and _step_choice(x, A, state, backend) == "triton":
        from archcompass.kernels.selective_scan.triton_scan import selective_scan_step_op

        return selective_scan_step_op(x, dt, A, B, C, D, gate, state), state
    y, state = _step(x, dt, A, B, C, state, inplace=not torch.is_grad_enabled())
    return _finished(y, x, D, gate), state


def explain(x: Tensor, A: Tensor, *, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with these inputs, and why."""
    return choose(OPERATION, backend, x.device, refusals=_triton_refusals(x, A), strict=strict)


def _triton_refusals(x: Tensor, A: Tensor) -> dict[str, str]:
    if x.dtype == torch.float64:
        return {"triton": "the kernels keep the state in float32, and x is float64"}
    if A.shape[1] > WIDEST_STATE:
        return {
            "triton": f"the kernels hold a channel's state in registers, and {A.shape[1]} is more than {WIDEST_STATE}"
        }
    return {}


def _step_choice(x: Tensor, A: Tensor, state: Tensor, backend: Backend) -> str:
    refusals = _triton_refusals(x, A)
    if torch.is_grad_enabled():
        refusals["triton"] = "the step kernel overwrites the state and has no gradients; call it under torch.no_grad"
    elif state.dtype != torch.float32 or not state.is_contiguous():
        refusals["triton"] = f"the step kernel overwrites a contiguous float32 state, not {state.dtype}"
    return choose(OPERATION, backend, x.device, refusals=refusals).backend


def _triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """With gradients, skip and gate run in torch after the kernel; without, inside it."""
    from archcompass.kernels.selective_scan.triton_scan import selective_scan_triton

    state, bounds = sequences(x, A.shape, initial_state, cu_seqlens)
    inputs = (x, dt, A, B, C, D, gate, state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        y, last = selective_scan_triton(x, dt, A, B, C, None, None, state, bounds, train=True)
        return _finished(y, x, D, gate), last
    return selective_scan_triton(x, dt, A, B, C, D, gate, state, bounds, train=False)


def _core(
    A: Tensor, backend: str, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return selective_scan_reference(x, dt, A, B, C, state)
    if x.shape[1] == 1:
        y, state = _step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, inplace=False)
        return y.unsqueeze(1), state
    precise = [tensor.to(state.dtype) for tensor in (x, dt, A, B, C)]
    x, dt, A, B, C = precise
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*precise, state))
    y, last, _ = selective_scan_torch(dt * x, dt, A, B, C, state, keep)
    return y, last


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, inplace: bool
) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C = cast(state.dtype, x, dt, A, B, C)
    factor = ((dt * LOG2_E).unsqueeze(-1) * A).exp2()
    state = state.mul_(factor) if inplace else state * factor
    written = (dt * x).unsqueeze(-1), B.unsqueeze(1)
    state = state.addcmul_(*written) if inplace else torch.addcmul(state, *written)
    return (state @ C.unsqueeze(-1)).squeeze(-1), state


def _finished(y: Tensor, x: Tensor, D: Tensor | None, gate: Tensor | None) -> Tensor:
    """Skip and gate."""
    if D is not None:
        y = torch.addcmul(y, *cast(y.dtype, x, D))
    if gate is not None:
        y = y * silu(gate.to(y.dtype))
    return y.to(x.dtype)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, gate: Tensor | None) -> None:
    if x.dim() != 3 or A.dim() != 2 or A.shape[0] != x.shape[2]:
        raise InputError(f"x {list(x.shape)} must be [batch, time, channels] and A {list(A.shape)} [channels, N]")
    same_shape("dt", dt, x.shape)
    same_shape("B", B, (*x.shape[:2], A.shape[1]))
    same_shape("C", C, B.shape)
    if D is not None:
        same_shape("D", D, x.shape[2:])
    if gate is not None:
        same_shape("gate", gate, x.shape)
    if A.device.type == "cpu" and not torch.compiler.is_compiling() and bool((A > 0).any()):
        raise InputError("A is positive somewhere; states grow without bound. Mamba passes -exp(A_log)")
