"""`attention`: softmax attention behind one name, with the backend and its reason."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from archcompass.errors import InputError
from archcompass.kernels.attention import prompt
from archcompass.kernels.attention.cost import check_visibility, first_visible
from archcompass.kernels.attention.pieces import Visibility, equal_width, widened
from archcompass.kernels.attention.reference import attention_mask, attention_reference
from archcompass.kernels.attention.step import one_query
from archcompass.kernels.attention.torch_op import attention_pieces
from archcompass.kernels.dispatch import Choice, choose, settled
from archcompass.kernels.eager import plain_call

WIDEST_ROW_BYTES = 512  # 256 columns of a half type, 128 of float32
SDPA_REASON = "torch's fused attention serves this call; our kernel has not been measured against it yet"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    padding: Tensor | None = None,
    key_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ) v over the keys each query sees; a query that sees none gives zeros.

    The queries are the last `new` positions of the keys, so one call serves whole prompts (new == keys), further
    segments (new < keys) and single steps (new == 1).

    Args:
        q: [batch, new, heads, D].
        k, v: [batch, keys, kv_heads, D] and [batch, keys, kv_heads, Dv]; kv_heads divides heads.
        causal: a query sees no later key.
        window: a query sees only its last `window` keys, itself included.
        chunk: a query sees only keys of its own chunk of `chunk` positions, counted from absolute position 0 (Llama 4).
        sinks: [heads], a logit per head that joins the softmax and has no value (gpt-oss).
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2).
        scale: D ** -0.5 when None.
        padding: [batch] integers, the left padding of each row; those keys are invisible, and those queries zero.
        key_offset: absolute position of key 0, for caches that dropped old keys; chunks are counted with it.
        cu_seqlens: [sequences + 1] integers from 0 to new: batch 1 holds sequences packed end to end, blind to each
            other. Needs new == keys.
        return_lse: also return the log of the softmax's denominator, sink included: [batch, new, heads], at least
            float32; minus infinity where nothing is seen. No gradient flows through it.
        backend: "auto", "reference", "torch" or "triton".
        strict: with "auto", refuse to fall back from the fastest backend.

    Returns:
        [batch, new, heads, Dv], or that and the log-sum-exp.

    Raises:
        InputError: shapes or settings that do not fit together.
        BackendError: the backend asked for cannot serve this call.
    """
    _check(q, k, v, sinks, padding, cu_seqlens)
    check_visibility(causal, window, chunk, key_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    see = Visibility(causal, window, chunk, key_offset, scale, soft_cap)
    if causal and q.shape[1] == 1 and padding is None and q.device.type != "meta":
        k, v, see = _within_reach(k, v, see)
        whole = k.shape[1] > 0 and cu_seqlens is None and not return_lse
        if whole and backend in ("auto", "torch") and q.is_cpu and plain_call(q, k, v, sinks):
            return one_query(q, k, v, scale, sinks, soft_cap)
    special = return_lse or any(x is not None for x in (sinks, soft_cap, padding, cu_seqlens))
    plain = not special and _plain(q, k, see)
    chosen = "torch" if settled(backend, q) else _choose(q, v.shape[-1], plain, backend, strict).backend
    if q.device.type == "meta":
        out, lse = _meta(q, k, v, scale, return_lse)
    elif chosen == "reference":
        out, lse = _reference(q, k, v, see, sinks, padding, cu_seqlens)
    elif plain and chosen == "torch":
        return _sdpa(q, k, v, see)
    elif chosen == "triton":
        from archcompass.kernels.attention.triton_op import attention_triton

        out, lse = attention_triton(q, k, v, sinks, padding, cu_seqlens, see)
    else:
        out, lse = attention_pieces(q, k, v, sinks, padding, cu_seqlens, see)
    return (out, lse.detach()) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    key_offset: int = 0,
    special: bool = False,
    backend: str = "auto",
    strict: bool = False,
) -> Choice:
    """Which implementation `attention` takes for such tensors, and why.

    `special` says that the call has sinks, a soft cap, padding, packed sequences or asks for the log-sum-exp.
    """
    see = Visibility(causal, window, chunk, key_offset, 1.0, None)
    return _choose(q, q.shape[-1], not special and _plain(q, k, see), backend, strict)


def _choose(q: Tensor, value_dim: int, plain: bool, backend: str, strict: bool) -> Choice:
    if backend == "auto" and plain and q.device.type == "cuda":
        return Choice("attention", "torch", SDPA_REASON)
    return choose("attention", backend, q.device, refusals=refusals(q, value_dim), strict=strict)


def refusals(q: Tensor, value_dim: int) -> dict[str, str]:
    """Why the Triton kernels cannot take such queries, whatever the machine."""
    if q.dtype == torch.float64:
        return {"triton": "the kernels sum in float32, and q is float64"}
    if (row_bytes := max(q.shape[-1], value_dim) * q.element_size()) > WIDEST_ROW_BYTES:
        return {"triton": f"a row of {row_bytes} bytes in a head is more than the {WIDEST_ROW_BYTES} that tiles hold"}
    return {}


def _plain(q: Tensor, k: Tensor, see: Visibility) -> bool:
    """Whether one call of SDPA without a mask says it all: a causal square, or queries that see every key."""
    new, keys = q.shape[1], k.shape[1]
    if new == 0 or keys == 0 or new > keys:
        return False
    reach = min(keys if see.window is None else see.window, keys if see.chunk is None else see.chunk)
    one_chunk = see.chunk is None or see.key_offset % see.chunk + keys <= see.chunk
    return one_chunk and reach >= keys and (not see.causal or new in (1, keys))


def _within_reach(k: Tensor, v: Tensor, see: Visibility) -> tuple[Tensor, Tensor, Visibility]:
    """The keys that a single step sees: it sees all of those."""
    first = first_visible(k.shape[1] - 1, see.window, see.chunk, see.key_offset)
    seen = Visibility(False, None, None, 0, see.scale, see.soft_cap)
    return (k[:, first:], v[:, first:], seen) if first else (k, v, seen)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, see: Visibility) -> Tensor:
    group, new = q.shape[2] // k.shape[2], q.shape[1]
    if see.causal and new > 1 and prompt.serves(q, k, v):
        return prompt.prompt_attention(q, k, v, see.scale)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if new == 1:
        # A step's heads become query rows of their key-value head, which reads each key once and not once per head.
        rows = torch.unflatten(q[:, 0], 1, (-1, group))
        return scaled_dot_product_attention(rows, k, v, scale=see.scale).flatten(1, 2).unsqueeze(1)
    q, value_dim = q.transpose(1, 2), v.shape[-1]
    if q.device.type == "cpu" and k.shape[-1] != value_dim:
        # The fused kernel wants one width; zero columns cost a third, the unfused kernel twice as much.
        k, v = equal_width(k, v)
        q = widened(q, k.shape[-1])
    out = scaled_dot_product_attention(q, k, v, is_causal=see.causal, scale=see.scale, enable_gqa=group > 1)
    return out[..., :value_dim].transpose(1, 2)


def _meta(q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Shapes only, by one dense call that torch's counter sees (`dense_flops`): masks change neither."""
    grouped = q.shape[2] > k.shape[2]
    q_heads, k_heads, v_heads = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q_heads, k_heads, v_heads, scale=scale, enable_gqa=grouped).transpose(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, q.new_empty(q.shape[:3], dtype=wide) if return_lse else out


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    see: Visibility,
    sinks: Tensor | None,
    padding: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    visible = attention_mask(
        q.shape[1],
        k.shape[1],
        causal=see.causal,
        window=see.window,
        chunk=None if cu_seqlens is not None else see.chunk,
        padding=padding,
        key_offset=see.key_offset,
        device=q.device,
    )
    if cu_seqlens is not None:
        position = torch.arange(q.shape[1], device=q.device)
        sequence = torch.searchsorted(cu_seqlens.to(torch.int64), position, right=True)
        visible = visible & (sequence[:, None] == sequence)
        if see.chunk is not None:
            within = (position - cu_seqlens.to(torch.int64)[sequence - 1] + see.key_offset) // see.chunk
            visible = visible & (within[:, None] == within)
    return attention_reference(q, k, v, visible, sinks=sinks, soft_cap=see.soft_cap, scale=see.scale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, padding: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise InputError(f"{_shapes(q, k, v)}: attention takes [batch, time, heads, dim]")
    (batch, new, heads, width), keys = q.shape, k.shape
    if batch != keys[0] or keys[:3] != v.shape[:3] or width != keys[3]:
        raise InputError(f"{_shapes(q, k, v)}: batch, keys, kv_heads and the width of q and k must agree")
    if keys[2] == 0 or heads % keys[2]:
        raise InputError(f"{heads} heads over {keys[2]} kv_heads: kv_heads must divide heads")
    if sinks is not None and sinks.shape != (heads,):
        raise InputError(f"sinks has shape {list(sinks.shape)}; it holds one logit per head: [{heads}]")
    if padding is not None and padding.shape != (batch,):
        raise InputError(f"padding has shape {list(padding.shape)}; it holds one count per row: [{batch}]")
    if cu_seqlens is not None and (batch != 1 or new != keys[1] or padding is not None):
        rule = "packed sequences are one row, as many queries as keys, no padding"
        raise InputError(f"{_shapes(q, k, v)} with cu_seqlens: {rule}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
