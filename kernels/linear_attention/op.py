"""The public face of decayed linear attention: checks, choice of backend, packed sequences."""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.dispatch import Backend, Choice, choose
from archcompass.kernels.linear_attention import chunked
from archcompass.kernels.linear_attention.cost import Decay, default_chunk_size
from archcompass.kernels.linear_attention.reference import reference
from archcompass.kernels.packed import same_shape, spans

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
    decay = _checked(q, k, v, log_decay, bonus, exclusive, initial_state, cu_seqlens, chunk_size)
    choice = explain(q, k, v, backend=backend, strict=strict)
    if choice.backend == "triton":
        return _triton(q, k, v, log_decay, bonus, exclusive, scale, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        return _packed(
            q, k, v, log_decay, bonus, exclusive, scale, initial_state, cu_seqlens, chunk_size, choice.backend
        )
    state = _first_state(q, v, initial_state, q.shape[0])
    if choice.backend == "reference":
        share = v.shape[2] // q.shape[2]
        queries, keys = (x.repeat_interleave(share, dim=2) for x in (q, k))
        forget = _per_channel(log_decay, state)
        out, state = reference(queries, keys, v, forget, bonus, exclusive, scale, state)
        return out.to(v.dtype), state
    if q.shape[1] == 1:
        now = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, 0]
        out, state = chunked.step(q[:, 0], k[:, 0], v[:, 0], now, bonus, exclusive, scale, state, inplace=False)
        return out.unsqueeze(1), state
    if q.shape[1] == 0:
        return torch.empty_like(v), state.clone()
    size = chunk_size or default_chunk_size(decay, q.shape[1])
    dtype = v.dtype
    if dtype == torch.float16 and q.device.type == "cpu":  # a CPU multiplies float16 a hundred times slower
        q, k, v = (x.float() for x in (q, k, v))
    out, state = chunked.chunked(q, k, v, log_decay, bonus, exclusive, scale, state, size)
    return out.to(dtype), state


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
) -> tuple[Tensor, Tensor]:
    """One token per sequence, for decoding: the recurrence of `linear_attention` without its time axis.

    Args:
        q: query, [batch, key_groups, K]; k: key, likewise; v: value, [batch, heads, V].
        log_decay: None, [heads], [batch, heads] or [batch, heads, K].
        state: [batch, heads, K, V]. With gradients disabled it is overwritten and returned.

    Returns:
        output [batch, heads, V] in the dtype of v, and the new state.
    """
    overwrite = not torch.is_grad_enabled()
    ready = state.is_cuda and state.dtype == torch.float32 and state.is_contiguous()
    if overwrite and ready and explain(q, k, v).backend == "triton":
        from archcompass.kernels.linear_attention.triton_op import step_op

        return step_op(q, k, v, log_decay, bonus, state, exclusive, scale), state
    return chunked.step(q, k, v, log_decay, bonus, exclusive, scale, state, inplace=overwrite)


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with these inputs, and why."""
    refusals = {}
    if v.dtype == torch.float64:
        refusals["triton"] = "the kernels sum in float32, and v is float64"
    elif not q.dtype == k.dtype == v.dtype:
        refusals["triton"] = f"the kernels take one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    return choose(OPERATION, backend, q.device, refusals=refusals, strict=strict)


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


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    exclusive: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> Decay:
    """Refuses what does not belong together; returns the kind of decay."""
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [batch, time, key_groups, K] twice "
            "and [batch, time, heads, V]"
        )
    batch, time, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    if heads % groups:
        raise InputError(f"v has {heads} heads, which {groups} key groups cannot share evenly")
    kind = decay_kind(log_decay)
    shapes = {"constant": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}
    if log_decay is not None:
        same_shape("log_decay", log_decay, shapes[kind])
        if _values_at_hand(log_decay) and bool((log_decay > 0).any()):
            raise InputError("log_decay is positive somewhere; it is the logarithm of a factor of at most 1")
    if bonus is not None:
        if not exclusive:
            raise InputError("bonus weighs the current token of the exclusive form; set exclusive=True")
        same_shape("bonus", bonus, (heads, key_dim))
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise InputError(f"packed sequences need a batch of 1, not {batch}")
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        same_shape("initial_state", initial_state, (sequences, heads, key_dim, value_dim))
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise InputError(f"chunk_size is {chunk_size}; it must be a power of two, such as 64")
    return kind


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


def _first_state(q: Tensor, v: Tensor, initial_state: Tensor | None, sequences: int) -> Tensor:
    """The state before the first token, in the dtype the recurrence is computed in."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=v.device)


def _per_channel(log_decay: Tensor | None, state: Tensor) -> Tensor:
    """A log decay that broadcasts to [batch, time, heads, K]."""
    if log_decay is None:
        return state.new_zeros(())
    return log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    exclusive: bool,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Packed sequences one after the other; on meta, where lengths are unknown, as if they were all equally long."""
    outputs, states = [], []
    for n, (start, end) in enumerate(spans(cu_seqlens, q.shape[1])):
        decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, start:end]
        out, state = linear_attention(
            q[:, start:end],
            k[:, start:end],
            v[:, start:end],
            decay,
            bonus=bonus,
            exclusive=exclusive,
            scale=scale,
            initial_state=None if initial_state is None else initial_state[n : n + 1],
            chunk_size=chunk_size,
            backend=backend,  # type: ignore[arg-type]
        )
        outputs.append(out)
        states.append(state)
    if not outputs:
        return torch.empty_like(v), _first_state(q, v, initial_state, 0)
    return torch.cat(outputs, dim=1), torch.cat(states)
