"""The public face of the delta rule: checks, choice of backend, packed sequences."""

from functools import partial

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.delta_rule.chunked import delta_rule_chunked, dplr_chunked
from archcompass.kernels.delta_rule.cost import CHUNK_SIZE, effective_chunk
from archcompass.kernels.delta_rule.reference import delta_rule_reference, dplr_reference
from archcompass.kernels.delta_rule.step import delta_rule_step_torch, dplr_step_torch
from archcompass.kernels.delta_rule.tiles import CHUNK_SIZES, WIDEST_KEY
from archcompass.kernels.dispatch import Backend, Choice, choose, settled
from archcompass.kernels.packed import over_sequences, same_shape, sequences
from archcompass.kernels.steps import overwriting


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule: DeltaNet, Gated DeltaNet and Kimi Delta Attention.

        S_t = (I - β_t k_t k_tᵀ) Diag(exp(g_t)) S_{t-1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    Domain: k of length one (the caller normalises) and beta in [0, 2], else the state may grow without bound; the log
    decay at most 0 and as strong as one likes. No exponent inside is past 60. Past -110 a single token forgets
    everything (-800 in float64); the decay between two tokens of a chunk is exact to |sum of the chunk's log decay|
    times the rounding of float32.

    Args:
        q: queries, [batch, time, key_heads, K]; consecutive heads share a key head.
        k: keys, likewise.
        v: values, [batch, time, heads, V], heads a multiple of key_heads.
        beta: strength of each write, [batch, time, heads], 0 to 2.
        log_decay: g, None (DeltaNet), [batch, time, heads] (Gated DeltaNet) or [batch, time, heads, K] (Kimi Delta
            Attention).
        scale: factor of the output. Models that scale queries by K^-0.5 pass it here.
        initial_state: [batch, heads, K, V] (one per sequence when packed); None is zero.
        cu_seqlens: boundaries of packed sequences, [sequences + 1], from 0 to time; the batch must be 1.
        chunk_size: tokens per chunk, a power of two; None takes 64.
        backend: "auto", or the implementation to use.
        strict: with "auto", refuse to fall back from the fastest backend of the device.

    Returns:
        outputs [batch, time, heads, V] in the dtype of v, and the state after the last token of every sequence,
        [batch or sequences, heads, K, V], float32 (float64 for float64 inputs).

    Raises:
        InputError: shapes that do not belong together, a positive decay (seen on the CPU only), a chunk that is no
            power of two.
        BackendError: the backend cannot run here.
    """
    _check_delta(q, k, v, beta, log_decay)
    chunk = _checked_chunk(chunk_size, v.shape[1])
    choice = explain(q, chunk_size=chunk, backend=backend, strict=strict)
    size = (v.shape[2], q.shape[3], v.shape[3])
    if choice.backend == "triton" and v.numel():
        from archcompass.kernels.delta_rule.triton_op import delta_rule_triton

        state, bounds = sequences(v, size, initial_state, cu_seqlens)
        return delta_rule_triton(q, k, v, beta, log_decay, state, scale, chunk, bounds)
    run = partial(_delta_core, backend=choice.backend, scale=scale, chunk=chunk)
    return over_sequences(run, [q, k, v, beta, log_decay], v, size, initial_state, cu_seqlens)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Diagonal plus low-rank transitions: RWKV-7, and as special cases everything `delta_rule` does.

        S_t = Diag(exp(w_t)) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    RWKV-7 passes a = -κ̂ and b = κ̂ ∘ (in-context learning rate). Domain as for `delta_rule`: the transition
    Diag(exp(w)) + b aᵀ must not be longer than one, else the state grows.

    Args:
        q, k, a, b: [batch, time, heads, K].
        v: [batch, time, heads, V].
        log_decay: w, [batch, time, heads, K], at most 0.

    The remaining arguments, results and errors are those of `delta_rule`.
    """
    _check_dplr(q, k, v, a, b, log_decay)
    chunk = _checked_chunk(chunk_size, v.shape[1])
    choice = explain_dplr(q, chunk_size=chunk, backend=backend, strict=strict)
    size = (v.shape[2], q.shape[3], v.shape[3])
    if choice.backend == "triton" and v.numel():
        from archcompass.kernels.delta_rule.triton_op import dplr_triton

        state, bounds = sequences(v, size, initial_state, cu_seqlens)
        return dplr_triton(q, k, v, a, b, log_decay, state, scale, chunk, bounds)
    run = partial(_dplr_core, backend=choice.backend, scale=scale, chunk=chunk)
    return over_sequences(run, [q, k, v, a, b, log_decay], v, size, initial_state, cu_seqlens)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token per sequence, for decoding: the recurrence of `delta_rule` without its time axis.

    Args:
        q: query, [batch, key_heads, K]; k: key, likewise; v: value, [batch, heads, V].
        beta: [batch, heads].
        log_decay: None, [batch, heads] or [batch, heads, K].
        state: [batch, heads, K, V]. With gradients disabled it is overwritten and returned.
        backend: "auto", or the implementation to use; "reference" is the same code as "torch".

    Returns:
        output [batch, heads, V] in the dtype of v, and the new state.

    Raises:
        BackendError: the backend cannot run here, or has no gradients and they are wanted.
    """
    if not settled(backend, q) and _step_choice("delta_rule", q, state, backend) == "triton":
        from archcompass.kernels.delta_rule.triton_step import delta_rule_step_op

        return delta_rule_step_op(q, k, v, beta, log_decay, state, scale), state
    inputs = (q, k, v, beta, log_decay)
    if torch.is_grad_enabled():
        return delta_rule_step_torch(*inputs, state, scale, inplace=False)
    return overwriting(partial(delta_rule_step_torch, scale=scale, inplace=True), state, *inputs)


def dplr_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token per sequence of `dplr`, without its time axis: [batch, heads, K] and [batch, heads, V].

    With gradients disabled the state [batch, heads, K, V] is overwritten and returned; `backend` as in
    `delta_rule_step`.
    """
    if not settled(backend, q) and _step_choice("dplr", q, state, backend) == "triton":
        from archcompass.kernels.delta_rule.triton_step import dplr_step_op

        return dplr_step_op(q, k, v, a, b, log_decay, state, scale), state
    inputs = (q, k, v, a, b, log_decay)
    if torch.is_grad_enabled():
        return dplr_step_torch(*inputs, state, scale, inplace=False)
    return overwriting(partial(dplr_step_torch, scale=scale, inplace=True), state, *inputs)


def explain(q: Tensor, *, chunk_size: int = CHUNK_SIZE, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation of `delta_rule` serves a call with these queries, and why."""
    return choose("delta_rule", backend, q.device, refusals=_triton_refusals(q, chunk_size), strict=strict)


def explain_dplr(q: Tensor, *, chunk_size: int = CHUNK_SIZE, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation of `dplr` serves a call with these queries, and why."""
    return choose("dplr", backend, q.device, refusals=_triton_refusals(q, chunk_size), strict=strict)


def _step_choice(operation: str, q: Tensor, state: Tensor, backend: Backend) -> str:
    refusals = _triton_refusals(q, CHUNK_SIZE)
    if torch.is_grad_enabled():
        refusals["triton"] = "the step kernel overwrites the state and has no gradients; call it under torch.no_grad"
    elif state.dtype != torch.float32 or not state.is_contiguous():
        refusals["triton"] = f"the step kernel overwrites a contiguous float32 state, not {state.dtype}"
    return choose(operation, backend, q.device, refusals=refusals).backend


def _triton_refusals(q: Tensor, chunk: int) -> dict[str, str]:
    if q.dtype == torch.float64:
        return {"triton": "the kernels keep the state in float32, and q is float64"}
    if q.shape[-1] > WIDEST_KEY:
        return {
            "triton": f"the kernels hold the key dimension in registers, and {q.shape[-1]} is more than {WIDEST_KEY}"
        }
    if chunk not in CHUNK_SIZES:
        return {"triton": f"chunk_size is {chunk}, and the kernels know {', '.join(map(str, CHUNK_SIZES))}"}
    return {}


def _delta_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    state: Tensor,
    backend: str,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return delta_rule_reference(q, k, v, beta, log_decay, state, scale)
    if v.shape[1] == 1:
        q, k, v, beta = (x[:, 0] for x in (q, k, v, beta))
        log_decay = None if log_decay is None else log_decay[:, 0]
        out, state = delta_rule_step_torch(q, k, v, beta, log_decay, state, scale, inplace=False)
        return out.unsqueeze(1), state
    return delta_rule_chunked(q, k, v, beta, log_decay, state, scale, chunk)


def _dplr_core(*inputs: Tensor, state: Tensor, backend: str, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    q, k, v, a, b, log_decay = inputs
    if backend == "reference":
        return dplr_reference(q, k, v, a, b, log_decay, state, scale)
    if v.shape[1] == 1:
        q, k, v, a, b, log_decay = (x[:, 0] for x in inputs)
        out, state = dplr_step_torch(q, k, v, a, b, log_decay, state, scale, inplace=False)
        return out.unsqueeze(1), state
    return dplr_chunked(q, k, v, a, b, log_decay, state, scale, chunk)


def _check_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [batch, time, key_heads, K] twice "
            "and [batch, time, heads, V]"
        )
    if v.shape[2] % q.shape[2]:
        raise InputError(f"v has {v.shape[2]} heads, which {q.shape[2]} key heads cannot share evenly")
    same_shape("beta", beta, v.shape[:3])
    if log_decay is not None:
        same_shape("log_decay", log_decay, v.shape[:3] if log_decay.dim() == 3 else (*v.shape[:3], q.shape[3]))
        _check_not_positive(log_decay)


def _check_dplr(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> None:
    if q.dim() != 4 or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise InputError(
            f"q {list(q.shape)} and v {list(v.shape)} must be [batch, time, heads, K] and [batch, time, heads, V]"
        )
    for name, tensor in (("k", k), ("a", a), ("b", b), ("log_decay", log_decay)):
        same_shape(name, tensor, q.shape)
    _check_not_positive(log_decay)


def _check_not_positive(log_decay: Tensor) -> None:
    """Looks at the values only where that waits for no device and breaks no graph."""
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((log_decay > 0).any()):
        raise InputError("log_decay is positive somewhere; it is the logarithm of a factor of at most 1")


def _checked_chunk(chunk_size: int | None, time: int) -> int:
    size = CHUNK_SIZE if chunk_size is None else chunk_size
    if size < 1 or size & (size - 1):
        raise InputError(f"chunk_size is {size}; it must be a power of two, such as 64")
    return effective_chunk(time, size)
