"""Decayed linear attention as matrix products over chunks: the path for CPUs, and for GPUs without Triton.

With b the running sum of the log decay inside a chunk of C tokens, and b_C its total:

    O = (Q e^b) S + (A . causal) V          A_ij = sum_d q_id k_jd e^(b_id - b_jd)
    S <- e^(b_C) S + (K e^(b_C - b))^T V

A decay per head that stays moderate inside a chunk takes the form of `centred.py`. One that is stronger takes A from the
product Q K^T, shared by the heads of a group, times e^(b_i - b_j), whose exponents are never positive. A decay per channel
has no such product: `kernels/decay.py` halves the chunk again and again.

Heads that share queries and keys keep sharing them: the state of a group is held as [K, heads * V], and one product
serves all its heads.
"""

from __future__ import annotations

from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.kernels.decay import (
    STRONGEST_DECAY,
    decay_matrix,
    decayed,
    made_again,
    moderated,
    strong_heads,
    vector_decayed_scores,
)
from archcompass.kernels.eager import cast
from archcompass.kernels.linear import products
from archcompass.kernels.linear_attention.centred import centred_chunks

# Elements of the largest temporary tensor that is still in a core's cache when it is read again.
CACHED_ELEMENTS = 1 << 17
# Where more than one head in this many decays strongly, the exact form serves them all.
FEW = 4


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    exclusive: bool,
    scale: float,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Runs the chunked form.

    Args:
        q: queries, [batch, time, groups, K]; k: keys, likewise; v: values, [batch, time, heads, V].
        decay: log decay, [heads], [batch, time, heads], [batch, time, heads, K] or None.
        bonus: weight of the current token, [heads, K], or None; only with `exclusive`.
        exclusive: whether a token reads the state before it is written.
        scale: factor of the output.
        state: the state before the first token, [batch, heads, K, V], float32 (float64 for float64 inputs).
        chunk_size: tokens per chunk, a power of two.

    Returns:
        outputs [batch, time, heads, V] in the dtype of v, and the state after the last token.
    """
    time = q.shape[1]
    whole = time - time % chunk_size
    outputs = []
    for start, end in ((0, whole), (whole, time)):
        if start < end:
            faded = decay if decay is None or decay.dim() == 1 else decay[:, start:end]
            padded = _padded(q[:, start:end], k[:, start:end], v[:, start:end], faded, -(end - start) % chunk_size)
            out, state = _whole_chunks(*padded, exclusive, state, chunk_size)
            outputs.append(out[:, : end - start])
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    if exclusive and bonus is not None:
        out = out + own_token(q, k, v, bonus)
    return (out * scale if scale != 1.0 else out).to(v.dtype), state


def _padded(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Fills the last chunk with tokens of zeros, which neither write nor fade."""
    if not padding:
        return q, k, v, decay
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(1, q.shape[1], -1)
    if decay is not None:
        decay = F.pad(decay, (0, 0) * (decay.dim() - 2) + (0, padding))
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
    return q, k, v, decay


def _whole_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, exclusive: bool, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.unflatten(1, (-1, chunk)) for x in (q, k, v))
    if decay is not None:
        decay = decay.to(state.dtype)
        decay = decay.expand(1, q.shape[1], chunk, -1) if decay.dim() == 1 else decay.unflatten(1, (-1, chunk))
    if decay is not None and decay.dim() == 5:
        out, state = _per_channel(q, k, v, decay, exclusive, state)
    else:
        out, state = _per_head(q, k, v, decay, exclusive, state)
    return out.flatten(1, 2), state


def _per_head(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The centred form where the decay allows it, the exact one for the heads where it does not."""
    if decay is None:
        return centred_chunks(q, k, v, None, exclusive, state)
    strong = strong_heads(decay)
    exactly = partial(_exact_chunks, q, k, v, decay, exclusive, state)
    if strong is None:
        return exactly()
    if FEW * strong.numel() > v.shape[3]:
        return made_again(exactly)
    out, last = centred_chunks(q, k, v, moderated(decay, strong), exclusive, state)
    if not strong.numel():
        return out, last
    exact, after = made_again(partial(_exact_heads, strong, q, k, v, decay, exclusive, state))
    return out.index_copy(3, strong, exact), last.index_copy(1, strong, after)


def _exact_heads(
    heads: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The exact form of some heads."""
    group = heads // (v.shape[3] // q.shape[3])
    theirs = (q[:, :, :, group], k[:, :, :, group], v[:, :, :, heads], decay[..., heads])
    return _exact_chunks(*theirs, exclusive, state[:, heads])


def _exact_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One decay per head, as strong as it likes: the heads of a group share scores, each with a decay matrix of its own."""
    groups = q.shape[3]
    q, k = q.transpose(2, 3), k.transpose(2, 3)  # [batch, chunks, groups, C, K]
    values = v.unflatten(3, (groups, -1))
    fading = _fading(decay.unflatten(3, (groups, -1)), exclusive, v)
    state = state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)  # [batch, groups, K, heads of the group * V]
    step = _chunks_at_once(v, q.shape[-1])
    out = values.new_empty(values.shape) if step < v.shape[1] else None
    places = repeat(None) if out is None else out.split(step, dim=1)
    pieces = zip(places, *(x.split(step, dim=1) for x in (q, k, values, *fading)), strict=False)
    for place, some_q, some_k, some_v, *faded in pieces:
        piece, state = _chunks_of_heads(some_q, some_k, some_v, _Fading(*faded), exclusive, state, place)
    out = piece if out is None else out
    state = state.unflatten(3, (-1, v.shape[4])).transpose(2, 3).flatten(1, 2).contiguous()
    return out.flatten(3, 4), state


def _chunks_of_heads(
    q: Tensor, k: Tensor, v: Tensor, fading: _Fading, exclusive: bool, state: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Some chunks, written to `out` if given: the products inside each, the state through all, and what queries read of it."""
    scores = (q @ k.mT).tril(-1 if exclusive else 0)
    weights = scores.unsqueeze(3) * decay_matrix(fading.read, fading.running).to(v.dtype)
    inside = (weights @ v.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)
    written = products(k.mT, (v * fading.to_end).flatten(4).transpose(2, 3))
    states, state = _pass_state(written, fading.through, state)
    across = products(q, states.to(q.dtype)).transpose(2, 3).reshape(v.shape)
    return torch.addcmul(inside, across, fading.from_start, out=out), state


class _Fading(NamedTuple):
    """What a decay per head does inside chunks.

    `read` and `running` are the log decay from the start of the chunk to where a token reads, and to where it has
    written, [batch, chunks, groups, heads, C]; `from_start` = e^read and `to_end` = e^(b_C - b) weigh values, [batch,
    chunks, C, groups, heads, 1]; `through` = e^(b_C) weighs columns of the state, [batch, chunks, groups, 1, heads * V].
    """

    read: Tensor
    running: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor


def _fading(decay: Tensor, exclusive: bool, v: Tensor) -> _Fading:
    """Of a decay [batch, chunks, C, groups, heads], for values like v."""
    decay = decay.clamp(min=STRONGEST_DECAY[decay.dtype])
    running = decay.cumsum(dim=2)
    read = running - decay if exclusive else running
    total = running[:, :, -1:]
    from_start, to_end = (decayed(x).to(v.dtype).unsqueeze(-1) for x in (read, total - running))
    through = decayed(total[:, :, 0]).repeat_interleave(v.shape[-1], dim=-1).unsqueeze(-2)
    # Contiguous by head, or every product with the scores would pay for the order of these.
    read, running = (x.permute(0, 1, 3, 4, 2).contiguous() for x in (read, running))
    return _Fading(read, running, from_start, to_end, through)


def _chunks_at_once(v: Tensor, key_dim: int) -> int:
    """Of [batch, chunks, C, heads, V], on a CPU as many chunks as stay in its cache; all, where a graph is recorded."""
    chunks, size = v.shape[1:3]
    if v.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return chunks
    return max(1, CACHED_ELEMENTS * chunks // (v.numel() // v.shape[-1] * max(v.shape[-1], key_dim, size)))


def _pass_state(written: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Hands the state from chunk to chunk: S <- kept S + written.

    Args:
        written: what each chunk adds, [batch, chunks, groups, K, columns].
        kept: what a chunk leaves of the state before it, [batch or 1, chunks, groups, 1, columns] or, with a decay per
            channel, [batch, chunks, groups, K, 1].
        state: the state before the first chunk, [batch, groups, K, columns].

    Returns:
        the state before each chunk, and the state after the last.
    """
    before = []
    for n in range(written.shape[1]):
        before.append(state)
        state = torch.addcmul(written[:, n].to(state.dtype), kept[:, n], state)
    return (torch.stack(before, dim=1) if len(before) > 1 else before[0].unsqueeze(1)), state


def _per_channel(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One decay per head, token and key channel: every head has its own scores."""
    share = v.shape[3] // q.shape[3]
    if share > 1:
        q, k = (x.repeat_interleave(share, dim=3) for x in (q, k))
    step = _chunks_at_once(v, q.shape[-1])
    decay = decay.clamp(min=STRONGEST_DECAY[decay.dtype])
    q, k, v, decay = (x.transpose(2, 3) for x in (q, k, v, decay))  # [batch, chunks, heads, C, .]
    pieces = []
    for first in range(0, v.shape[1], step):
        here = slice(first, first + step)
        piece, state = _chunks_of_channels(q[:, here], k[:, here], v[:, here], decay[:, here], exclusive, state)
        pieces.append(piece.transpose(2, 3))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), state


def _chunks_of_channels(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some chunks, as `_chunks_of_heads`."""
    running = decay.cumsum(dim=3)
    read = running - decay if exclusive else running
    total = running[:, :, :, -1:]
    scores = vector_decayed_scores(*(x.unsqueeze(-2) for x in (q, read, k, running))).squeeze(-1).squeeze(-2)
    inside = (scores.tril(-1) if exclusive else scores) @ v
    written = (k * decayed(total - running)).to(k.dtype).mT @ v
    states, state = _pass_state(written, decayed(total).mT, state)
    return inside + (q * decayed(read)).to(q.dtype) @ states.to(q.dtype), state


def own_token(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """What the current token adds through its bonus: (q . diag(u) k) v."""
    groups = q.shape[2]
    weight = (q * k).transpose(1, 2) @ bonus.to(q.dtype).unflatten(0, (groups, -1)).mT  # [batch, groups, time, heads]
    by_head: Tensor = weight.transpose(1, 2).flatten(2).unsqueeze(-1)
    return by_head * v


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    exclusive: bool,
    scale: float,
    state: Tensor,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: fade the state, add k v^T, read it with q.

    Args:
        q: query, [batch, groups, K]; k: key, likewise; v: value, [batch, heads, V].
        decay: log decay, [heads], [batch, heads], [batch, heads, K] or None.
        inplace: write the new state over the old one.

    Returns:
        output [batch, heads, V] in the dtype of v, and the new state.
    """
    share = v.shape[1] // q.shape[1]
    dtype = state.dtype
    queries, keys, values = cast(dtype, q, k, v)
    if share > 1:
        queries, keys = (x.repeat_interleave(share, dim=1) for x in (queries, keys))
    if exclusive:
        read = (queries.unsqueeze(-2) @ state).squeeze(-2)
    if decay is not None:
        forget = decay.to(dtype).exp()
        forget = forget.unsqueeze(-1) if decay.dim() == 3 else forget[..., None, None]
        state = state.mul_(forget) if inplace else state * forget
    written = keys.unsqueeze(-1), values.unsqueeze(-2)
    state = state.addcmul_(*written) if inplace else torch.addcmul(state, *written)
    if not exclusive:
        read = (queries.unsqueeze(-2) @ state).squeeze(-2)
    if exclusive and bonus is not None:
        read = read + ((queries * keys).unsqueeze(-2) @ bonus.to(dtype).unsqueeze(-1)).squeeze(-1) * values
    return (read * scale if scale != 1.0 else read).to(v.dtype), state
