"""Decayed linear attention as matrix products over chunks: the path for CPUs, and for GPUs without Triton.

With b the running sum of the log decay inside a chunk of C tokens, and b_C its total:

    O = (Q e^b) S + (A . causal) V          A_ij = sum_d q_id k_jd e^(b_id - b_jd)
    S <- e^(b_C) S + (K e^(b_C - b))^T V

No exponent is ever positive, so nothing overflows however strong the decay. A scalar decay takes A from one product
Q K^T, shared by the heads of a group, times e^(b_i - b_j). A vector decay cannot: e^(-b_j) alone overflows. There the
chunk is halved again and again: queries of the right half meet keys of the left half through an anchor b* at the
boundary, (q e^(b_i - b*)) . (k e^(b* - b_j)), and both exponents are negative.

Heads that share queries and keys keep sharing them: the state of a group is held as [K, heads * V], and one product
serves all its heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# exp(x) below these is nothing beside the terms that remain, and as a denormal number it would slow a CPU down.
SMALLEST_EXPONENT = {torch.float64: -700.0, torch.float32: -80.0}
# One token that forgets this much forgets all; a stronger decay would only cost the running sum its precision.
STRONGEST_DECAY = {torch.float64: -800.0, torch.float32: -110.0}
# Elements of the largest temporary tensor that is still in a core's cache when it is read again.
CACHED_ELEMENTS = 1 << 17


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
    if decay is not None and decay.dim() == 4:
        return _per_channel(q, k, v, decay, exclusive, state, chunk)
    return _per_head(q, k, v, decay, exclusive, state, chunk)


def _per_head(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, exclusive: bool, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """One decay per head and token (or per head, or none): the heads of a group share one score matrix."""
    batch, time, groups = q.shape[:3]
    shape = (batch, time // chunk, chunk, groups, v.shape[2] // groups)
    q, k = (x.unflatten(1, shape[1:3]).transpose(2, 3) for x in (q, k))  # [batch, chunks, groups, C, K]
    values = v.reshape(*shape, v.shape[3])
    fading = None if decay is None else _fading(decay, shape, exclusive, state.dtype, v.dtype, v.shape[3])
    state = state.unflatten(1, shape[3:]).transpose(2, 3).flatten(3)  # [batch, groups, K, heads of the group * V]
    step = _chunks_at_once(values, q.shape[-1])
    out = torch.empty_like(values) if step < shape[1] else values
    for first in range(0, shape[1], step):
        here = slice(first, first + step)
        now = None if fading is None else fading.at(here)
        piece, state = _chunks_of_heads(q[:, here], k[:, here], values[:, here], now, exclusive, state)
        if step >= shape[1]:
            out = piece
        else:
            out[:, here] = piece
    state = state.unflatten(3, (-1, v.shape[3])).transpose(2, 3).flatten(1, 2).contiguous()
    return out.reshape(v.shape), state


def _chunks_of_heads(
    q: Tensor, k: Tensor, v: Tensor, fading: _Fading | None, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some chunks: the products inside each, the state through all, and what the queries read of it."""
    scores = (q @ k.mT).tril(-1 if exclusive else 0)
    if fading is None:
        inside = (scores @ _by_group(v)).transpose(2, 3)
        states, state = _pass_state(k.mT @ _by_group(v), None, state)
        return (inside + (q @ states.to(q.dtype)).transpose(2, 3)).reshape(v.shape), state
    weights = scores.unsqueeze(3) * fading.between().to(v.dtype)
    inside = (weights @ v.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)
    states, state = _pass_state(k.mT @ _by_group(v * fading.to_end), fading.through, state)
    across = (q @ states.to(q.dtype)).transpose(2, 3).reshape(v.shape)
    return torch.addcmul(inside, across, fading.from_start), state


class _Fading(NamedTuple):
    """What a decay per head does inside chunks; a constant decay, alike in all, has one chunk in the second place.

    `read` and `running` are the log decay from the start of the chunk to where a token reads, and to where it has
    written, [batch, chunks, groups, heads, C]; `from_start` = e^read and `to_end` = e^(b_C - b) weigh values, [batch,
    chunks, C, groups, heads, 1]; `through` = e^(b_C) weighs columns of the state, [batch, chunks, groups, 1, heads * V].
    """

    read: Tensor
    running: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor

    def at(self, chunks: slice) -> _Fading:
        """The part that belongs to some of the chunks."""
        return self if self.read.shape[1] == 1 else _Fading(*(x[:, chunks] for x in self))

    def between(self) -> Tensor:
        """e^(b_i - b_j) on and below the diagonal, [batch, chunks, groups, heads, C, C]; above it, 1."""
        i, j = self.read.unsqueeze(-1), self.running.unsqueeze(-2)
        return (i - j).clamp(SMALLEST_EXPONENT[i.dtype], 0.0).exp()


def _fading(
    decay: Tensor, shape: tuple[int, ...], exclusive: bool, dtype: torch.dtype, value_dtype: torch.dtype, value_dim: int
) -> _Fading:
    decay = decay.to(dtype).clamp(min=STRONGEST_DECAY[dtype])
    decay = decay.expand(1, shape[2], -1) if decay.dim() == 1 else decay
    decay = decay.reshape(decay.shape[0], -1, *shape[2:])
    running = decay.cumsum(dim=2)
    read = running - decay if exclusive else running
    total = running[:, :, -1:]
    from_start, to_end = (_exp(x).to(value_dtype).unsqueeze(-1) for x in (read, total - running))
    through = _exp(total[:, :, 0]).repeat_interleave(value_dim, dim=-1).unsqueeze(-2)
    # Contiguous by head, or every product with the scores would pay for the order of these.
    read, running = (x.permute(0, 1, 3, 4, 2).contiguous() for x in (read, running))
    return _Fading(read, running, from_start, to_end, through)


def _by_group(v: Tensor) -> Tensor:
    """[batch, chunks, C, groups, heads of the group, V] as one matrix per group, [batch, chunks, groups, C, heads * V]."""
    return v.flatten(4).transpose(2, 3)


def _exp(x: Tensor) -> Tensor:
    """e^x, without denormal numbers."""
    return x.clamp(min=SMALLEST_EXPONENT[x.dtype]).exp()


def _chunks_at_once(values: Tensor, key_dim: int) -> int:
    """On a CPU as many chunks as stay in its cache; all, where a graph is recorded."""
    chunks, chunk = values.shape[1:3]
    if values.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return chunks
    return max(
        1, CACHED_ELEMENTS * chunks // (values.numel() // values.shape[-1] * max(values.shape[-1], key_dim, chunk))
    )


def _pass_state(written: Tensor, kept: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Hands the state from chunk to chunk: S <- kept S + written.

    Args:
        written: what each chunk adds, [batch, chunks, groups, K, columns].
        kept: what a chunk leaves of the state before it, [batch or 1, chunks or 1, groups, heads] (each for a share of
            the columns) or, with a decay per channel, [batch, chunks, groups, K, 1]; None for all of it.
        state: the state before the first chunk, [batch, groups, K, columns].

    Returns:
        the state before each chunk, and the state after the last.
    """
    chunks, before = written.shape[1], []
    if kept is not None and kept.dim() == 4:
        kept = kept.repeat_interleave(state.shape[-1] // kept.shape[-1], dim=-1).unsqueeze(-2)
    for n in range(chunks):
        before.append(state)
        new = written[:, n].to(state.dtype)
        state = state + new if kept is None else torch.addcmul(new, kept[:, n if kept.shape[1] > 1 else 0], state)
    return (torch.stack(before, dim=1) if chunks > 1 else before[0].unsqueeze(1)), state


def _per_channel(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """One decay per head, token and key channel: every head has its own scores."""
    share = v.shape[2] // q.shape[2]
    if share > 1:
        q, k = (x.repeat_interleave(share, dim=2) for x in (q, k))
    dtype = state.dtype
    decay = decay.to(dtype).clamp(min=STRONGEST_DECAY[dtype])
    sizes = (q.shape[1] // chunk, chunk)
    q, k, v, decay = (x.unflatten(1, sizes).transpose(2, 3) for x in (q, k, v, decay))  # [batch, chunks, heads, C, .]
    step = _chunks_at_once(v.transpose(2, 3), q.shape[-1])
    pieces = []
    for first in range(0, sizes[0], step):
        here = slice(first, first + step)
        piece, state = _chunks_of_channels(q[:, here], k[:, here], v[:, here], decay[:, here], exclusive, state)
        pieces.append(piece.transpose(2, 3))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return out.flatten(1, 2), state


def _chunks_of_channels(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some chunks, as `_chunks_of_heads`."""
    running = decay.cumsum(dim=3)
    read = running - decay if exclusive else running
    total = running[:, :, :, -1:]
    inside = _anchored_scores(q, k, read, running, exclusive) @ v
    written = (k * _exp(total - running)).to(k.dtype).mT @ v
    states, state = _pass_state(written, _exp(total).mT, state)
    return inside + (q * _exp(read)).to(q.dtype) @ states.to(q.dtype), state


def _anchored_scores(q: Tensor, k: Tensor, read: Tensor, running: Tensor, exclusive: bool) -> Tensor:
    """A_ij = sum_d q_id k_jd e^(b_id - b_jd) on and below the diagonal, by halving: [batch, chunks, heads, C, C].

    Blocks of one token are the diagonal; two neighbouring blocks make one of twice the size by the product of the
    right one's queries with the left one's keys, anchored at the boundary between them.
    """
    own = torch.zeros_like(q[..., 0]) if exclusive else (q * k).sum(-1)
    blocks, size = own[..., None, None], 1
    while size < q.shape[-2]:
        pairs = (q.shape[-2] // (2 * size), 2, size)
        q_right, read_right = (x.unflatten(-2, pairs)[..., 1, :, :] for x in (q, read))
        k_left, running_left = (x.unflatten(-2, pairs)[..., 0, :, :] for x in (k, running))
        anchor = running_left[..., -1:, :]
        faded_q = (q_right * _exp(read_right - anchor)).to(q.dtype)
        faded_k = (k_left * _exp(anchor - running_left)).to(k.dtype)
        left, right = blocks.unflatten(-3, pairs[:2]).unbind(-3)
        below = torch.cat([faded_q @ faded_k.mT, right], dim=-1)
        blocks, size = torch.cat([F.pad(left, (0, size)), below], dim=-2), 2 * size
    return blocks.squeeze(-3)


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
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
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
