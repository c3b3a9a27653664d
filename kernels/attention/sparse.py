"""Block-sparse attention: every query attends to a few blocks of keys that were chosen for it.

How blocks are chosen is the caller's: by mean-pooled keys (MoBA, arXiv 2502.13189), by compressed scores (NSA, arXiv
2502.11089). Queries of one key-value head share their choice. Causal: of the block it stands in, a query sees only the
keys up to itself.
"""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.attention.op import refusals as unsuited
from archcompass.kernels.attention.reference import attention_mask
from archcompass.kernels.dispatch import Choice, choose

GATHERED_ELEMENTS = 2**24  # keys that exist gathered, at a time


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ) v over the keys of the chosen blocks, up to the query's own position.

    Args:
        q: [batch, new, heads, D]; the queries are the last positions of the keys.
        k, v: [batch, keys, kv_heads, D] and [batch, keys, kv_heads, Dv].
        blocks: [batch, new, kv_heads, slots] integers, block b being the keys b block_size ... (b + 1) block_size - 1;
            no block twice, -1 for an unused slot. Blocks in the future are invisible.
        block_size: keys per block, a multiple of 16 for the Triton kernel.
        scale: D ** -0.5 when None.
        backend: "auto", "reference", "torch" or "triton".
        strict: with "auto", refuse to fall back from the fastest backend.

    Returns:
        output [batch, new, heads, Dv] (zeros where nothing is seen), and the log-sum-exp [batch, new, heads], with
        which outputs over other keys can be merged.

    Raises:
        InputError: shapes that do not fit together.
        BackendError: the backend asked for cannot serve this call.
    """
    _check(q, k, v, blocks, block_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = explain(q, k, v, block_size, backend=backend, strict=strict)
    if choice.backend == "triton":
        from archcompass.kernels.attention.triton_op import sparse_triton

        return sparse_triton(q, k, v, blocks, block_size, scale)
    if choice.backend == "reference":
        return _reference(q, k, v, blocks, block_size, scale)
    return _gathered(q, k, v, blocks, block_size, scale)


def explain(q: Tensor, k: Tensor, v: Tensor, block_size: int, *, backend: str = "auto", strict: bool = False) -> Choice:
    """Which implementation `sparse_attention` takes for such tensors, and why."""
    refusals = unsuited(q, v.shape[-1])
    if block_size % 16:
        refusals["triton"] = f"the kernel reads 16 keys at a time, which do not divide a block of {block_size}"
    return choose("sparse_attention", backend, q.device, refusals=refusals, strict=strict)


def _reference(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """The dense formula, all keys but the chosen ones masked."""
    (new, heads), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    of_key = torch.arange(keys, device=q.device) // block_size
    chosen = (blocks.unsqueeze(-1) == of_key).any(3)  # [batch, new, kv_heads, keys]
    visible = chosen & attention_mask(new, keys, device=q.device)[0][:, None]
    visible = visible.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights, lse = _softmax(scores.masked_fill(~visible, float("-inf")))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.transpose(1, 2)


def _gathered(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Gathers the chosen keys, a stretch of queries at a time."""
    per_query = max(1, blocks.shape[0] * blocks.shape[2] * blocks.shape[3] * block_size * (k.shape[-1] + v.shape[-1]))
    step = max(1, GATHERED_ELEMENTS // per_query)
    past = k.shape[1] - q.shape[1]
    parts = [
        _gathered_stretch(q[:, i : i + step], k, v, blocks[:, i : i + step], block_size, scale, past + i)
        for i in range(0, max(1, q.shape[1]), step)
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _gathered_stretch(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float, position: int
) -> tuple[Tensor, Tensor]:
    batch, new, _, _ = q.shape
    kv_heads = k.shape[2]
    key = (blocks.unsqueeze(-1) * block_size + torch.arange(block_size, device=q.device)).flatten(3)
    query = torch.arange(position, position + new, device=q.device)[:, None, None]
    visible = (blocks >= 0).repeat_interleave(block_size, dim=-1) & (key <= query)
    rows = key.clamp(0, max(0, k.shape[1] - 1))
    b, h = torch.arange(batch, device=q.device)[:, None, None, None], torch.arange(kv_heads, device=q.device)[:, None]
    picked_k, picked_v = k[b, rows, h], v[b, rows, h]  # [batch, new, kv_heads, slots block_size, width]
    scores = torch.unflatten(q, 2, (kv_heads, -1)) @ picked_k.transpose(-1, -2) * scale
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~visible.unsqueeze(3), float("-inf"))
    weights, lse = _softmax(scores)
    return (weights.to(v.dtype) @ picked_v).flatten(2, 3), lse.flatten(2, 3)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (zeros where every score is minus infinity) and log-sum-exp."""
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)), lse.squeeze(-1)


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, blocks {list(blocks.shape)}"
    if not (q.ndim == k.ndim == v.ndim == blocks.ndim == 4) or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"{shapes}: sparse_attention takes [batch, time, heads, dim] and [batch, new, kv_heads, slots]"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(f"{q.shape[2]} heads over {k.shape[2]} kv_heads: kv_heads must divide heads")
    if blocks.shape[:3] != (q.shape[0], q.shape[1], k.shape[2]):
        raise InputError(f"{shapes}: blocks must be [{q.shape[0]}, {q.shape[1]}, {k.shape[2]}, slots]")
    if block_size < 1:
        raise InputError(f"block_size is {block_size}; it must be at least 1 key")
