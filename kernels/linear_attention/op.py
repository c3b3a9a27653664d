"""The public face of decayed linear attention: checks, choice of backend, packed sequences."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.dispatch import Backend, Choice, choose, settled
from archcompass.kernels.linear_attention import chunked
from archcompass.kernels.linear_attention.cost import Decay, default_chunk_size
from archcompass.kernels.linear_attention.reference import reference
from archcompass.kernels.packed import over_sequences, same_shape

OPERATION = "linear_attention"


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    exclusive: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention over whole sequences, further segments or single tokens.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

    Domain: log decay at most 0, as strong as one likes; no exponent inside is past 60.

    Args:
        q: queries, [batch, time, key_groups, K]; consecutive heads share a group.
        k: keys, [batch, time, key_groups, K].
        v: values, [batch, time, heads, V], heads a multiple of key_groups.
        log_decay: g, at most 0: None (no decay), [heads] (constant), [batch, time, heads] (scalar) or
            [batch, time, heads, K] (vector). A token whose g is below -110 (-800 in float64) forgets all there is.
        bonus: u, [heads, K], with `exclusive` only: o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T q_t (RWKV-6).
        exclusive: read the state before the token is written into it.
        scale: factor of the output.
        initial_state: [batch, heads, K, V] (one per sequence when packed), float32, float64 for float64 inputs; None
            is zero.
        cu_seqlens: boundaries of packed sequences, [sequences + 1], from 0 to time; the batch must be 1.
        chunk_size: tokens per chunk, a power of two; None takes the default.
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
    _check(q, k, v, log_decay, bonus, exclusive, chunk_size)
    _check_sequences(q, v, initial_state, cu_seqlens)
    chosen = explain(q, k, v, backend=backend, strict=strict).backend
    if chosen == "triton":
        return _triton(q, k, v, log_decay, bonus, exclusive, scale, initial_state, cu_seqlens)
    settings: dict[str, Any] = {"bonus": bonus, "exclusive": exclusive, "scale": scale}
    run = (
        partial(_reference, **settings) if chosen == "reference" else partial(_torch, chunk_size=chunk_size, **settings)
    )
    if log_decay is not None and log_decay.dim() == 1:  # not along time
        run, log_decay = partial(run, constant=log_decay), None
    size = (v.shape[2], q.shape[3], v.shape[3])
    return over_sequences(run, (q, k, v, log_decay), v, size, initial_state, cu_seqlens)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    bonus: Tensor | None = None,
    exclusive: bool = False,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One token per sequence, for decoding: the recurrence of `linear_attention` without its time axis.

    Args:
        q: query, [batch, key_groups, K]; k: key, likewise; v: value, [batch, heads, V].
        log_decay: None, [heads], [batch, heads] or [batch, heads, K].
        state: [batch, heads, K, V]. With gradients disabled it is overwritten and returned.
        backend: "auto", or the implementation to use; "reference" is the same code as "torch".

    Returns:
        output [batch, heads, V] in the dtype of v, and the new state.

    Raises:
        BackendError: the backend cannot run here, or has no gradients and they are wanted.
    """
    if not settled(backend, q) and _step_choice(q, k, v, state, backend) == "triton":
        from archcompass.kernels.linear_attention.triton_op import step_op

        return step_op(q, k, v, log_decay, bonus, state, exclusive, scale), state
    inplace = not torch.is_grad_enabled()
    return chunked.step(q, k, v, log_decay, bonus, exclusive, scale, state, inplace=inplace)


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with these inputs, and why."""
    return choose(OPERATION, backend, q.device, refusals=_triton_refusals(q, k, v), strict=strict)


def _step_choice(q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: Backend) -> str:
    refusals = _triton_refusals(q, k, v)
    if torch.is_grad_enabled():
        refusals["triton"] = "the step kernel overwrites the state and has no gradients; call it under torch.no_grad"
    elif state.dtype != torch.float32 or not state.is_contiguous():
        refusals["triton"] = f"the step kernel overwrites a contiguous float32 state, not {state.dtype}"
    return choose(OPERATION, backend, q.device, refusals=refusals).backend


def _triton_refusals(q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
    if v.dtype == torch.float64:
        return {"triton": "the kernels sum in float32, and v is float64"}
    if not q.dtype == k.dtype == v.dtype:
        return {"triton": f"the kernels take one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"}
    return {}


def decay_kind(log_decay: Tensor | None) -> Decay:
    """The name of the shape of a log decay."""
    if log_decay is None:
        return "none"
    kinds: dict[int, Decay] = {1: "constant", 3: "scalar", 4: "vector"}
    if log_decay.dim() not in kinds:
        raise InputError(
            f"log_decay has shape {list(log_decay.shape)}; it is [heads], [batch, time, heads] or [batch, time, heads, K]"
        )
    return kinds[log_decay.dim()]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    exclusive: bool,
    chunk_size: int | None,
) -> None:
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [batch, time, key_groups, K] twice "
            "and [batch, time, heads, V]"
        )
    batch, time, groups, key_dim = q.shape
    heads = v.shape[2]
    if heads % groups:
        raise InputError(f"v has {heads} heads, which {groups} key groups cannot share evenly")
    if log_decay is not None:
        shapes = {"constant": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}
        same_shape("log_decay", log_decay, shapes[decay_kind(log_decay)])
        if _values_at_hand(log_decay) and bool((log_decay > 0).any()):
            raise InputError("log_decay is positive somewhere; it is the logarithm of a factor of at most 1")
    if bonus is not None:
        if not exclusive:
            raise InputError("bonus weighs the current token of the exclusive form; set exclusive=True")
        same_shape("bonus", bonus, (heads, key_dim))
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise InputError(f"chunk_size is {chunk_size}; it must be a power of two, such as 64")


def _check_sequences(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What can be said of packed sequences and their states without reading boundaries on the host."""
    if cu_seqlens is not None and q.shape[0] != 1:
        raise InputError(f"packed sequences need a batch of 1, not {q.shape[0]}")
    if initial_state is not None:
        many = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        same_shape("initial_state", initial_state, (many, v.shape[2], q.shape[3], v.shape[3]))


def _values_at_hand(tensor: Tensor) -> bool:
    """Whether values may be read on the host without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    exclusive: bool,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels; what the bonus adds is elementwise and left to torch."""
    from archcompass.kernels.linear_attention.triton_op import linear_attention_op

    initial = None if initial_state is None else initial_state.float()
    out, state = linear_attention_op(q, k, v, log_decay, initial, cu_seqlens, exclusive, scale)
    if exclusive and bonus is not None:
        out = out + scale * chunked.own_token(q, k, v, bonus)
    return out, state


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    state: Tensor,
    bonus: Tensor | None,
    exclusive: bool,
    scale: float,
    constant: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    queries, keys = (x.repeat_interleave(v.shape[2] // q.shape[2], dim=2) for x in (q, k))
    forget = _per_channel(log_decay if constant is None else constant, state)
    out, state = reference(queries, keys, v, forget, bonus, exclusive, scale, state)
    return out.to(v.dtype), state


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    state: Tensor,
    bonus: Tensor | None,
    exclusive: bool,
    scale: float,
    chunk_size: int | None,
    constant: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    time, dtype = q.shape[1], v.dtype
    if time == 0:
        return torch.empty_like(v), state.clone()
    decay = log_decay if constant is None else constant
    if time == 1:
        now = decay if log_decay is None else log_decay[:, 0]
        out, state = chunked.step(q[:, 0], k[:, 0], v[:, 0], now, bonus, exclusive, scale, state, inplace=False)
        return out.unsqueeze(1), state
    if dtype == torch.float16 and q.device.type == "cpu":  # a CPU multiplies float16 a hundred times slower
        q, k, v = (x.float() for x in (q, k, v))
    size = chunk_size or default_chunk_size(decay_kind(decay), time)
    out, state = chunked.chunked(q, k, v, decay, bonus, exclusive, scale, state, size)
    return out.to(dtype), state


def _per_channel(log_decay: Tensor | None, state: Tensor) -> Tensor:
    """A log decay that broadcasts to [batch, time, heads, K]."""
    if log_decay is None:
        return state.new_zeros(())
    return log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
