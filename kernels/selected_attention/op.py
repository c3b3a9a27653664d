"""`selected_attention`: every query gathers its own keys and attends to those.

Each query of a key-value head brings a list of key positions (the winners of an indexer, or the tokens of the blocks it
picked: DeepSeek-V3.2's sparse attention; MoBA, arXiv 2502.13189; NSA, arXiv 2502.11089). The torch path gathers a few
queries' keys at a time, so that memory stays bounded, and runs two batched products on them.
"""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.dispatch import Backend, Choice, choose
from archcompass.kernels.selected_attention.reference import selected_attention_reference

OPERATION = "selected_attention"
GATHERED_ELEMENTS = 2**23
"""Keys and values gathered at a time: 32 MiB in float32."""


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k_sᵀ) v_s over the selected keys s; a query without any gives zeros.

    Args:
        q: [batch, time, heads, D].
        k, v: [batch, keys, kv_heads, D] and [batch, keys, kv_heads, Dv]; kv_heads divides heads.
        index: [batch, time, kv_heads, slots] positions of the selected keys, shared by the heads of a key-value head.
        counts: like index, False where a slot is empty (its index is still a valid one).
        scale: D ** -0.5 when None.
        backend: "auto", "reference" or "torch".
        strict: with "auto", refuse to fall back from the fastest backend.

    Returns:
        [batch, time, heads, Dv], and the weights [batch, time, heads, slots].

    Raises:
        InputError: shapes that do not fit together.
        BackendError: the backend cannot run here.
    """
    _check(q, k, v, index, counts)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if explain(q, backend=backend, strict=strict).backend == "reference":
        return selected_attention_reference(q, k, v, index, counts, scale)
    batch, _, kv_heads, slots = index.shape
    block = max(1, GATHERED_ELEMENTS // max(1, batch * kv_heads * slots * (k.shape[-1] + v.shape[-1])))
    parts = zip(q.split(block, 1), index.split(block, 1), counts.split(block, 1), strict=True)
    done = [_attend(part, k, v, chosen, real, scale) for part, chosen, real in parts]
    return torch.cat([out for out, _ in done], 1), torch.cat([weights for _, weights in done], 1)


def explain(q: Tensor, *, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with these queries, and why."""
    return choose(OPERATION, backend, q.device, refusals={"triton": "no Triton kernel yet"}, strict=strict)


def _attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[2], k.shape[2]
    keys, values = _gather(k, index), _gather(v, index)  # [batch, time, kv_heads, slots, D]
    scores = (q.unflatten(2, (kv_heads, heads // kv_heads)) * scale) @ keys.mT
    empty = ~counts.unsqueeze(-2)
    weights = scores.masked_fill(empty, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(empty, 0.0)
    return (weights @ values).flatten(2, 3), weights.flatten(2, 3)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, keys, kv_heads, D] at index [batch, time, kv_heads, slots] -> [batch, time, kv_heads, slots, D]."""
    batch, keys, kv_heads, dim = x.shape
    rows = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * keys + index
    rows = rows * kv_heads + torch.arange(kv_heads, device=x.device).view(1, 1, -1, 1)
    return x.reshape(-1, dim).index_select(0, rows.flatten()).view(*index.shape, dim)


def _check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4) or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise InputError(f"{shapes}: attention takes [batch, time, heads, dim], k as wide as q and as long as v")
    if q.shape[2] % k.shape[2]:
        raise InputError(f"{q.shape[2]} heads over {k.shape[2]} kv_heads: kv_heads must divide heads")
    wanted = (q.shape[0], q.shape[1], k.shape[2])
    if index.ndim != 4 or index.shape[:3] != wanted or counts.shape != index.shape:
        raise InputError(
            f"index {list(index.shape)} and counts {list(counts.shape)} must both be {[*wanted, 'slots']}".replace(
                "'", ""
            )
        )
