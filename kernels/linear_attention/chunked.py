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

import torch
from torch import Tensor
from torch.nn import functional as F

# exp(x) below these is nothing beside the terms that remain, and as a denormal number it would slow a CPU down.
SMALLEST_EXPONENT = {torch.float64: -700.0, torch.float32: -80.0}
# One token that forgets this much forgets all; a stronger decay would only cost the running sum its precision.
STRONGEST_DECAY = {torch.float64: -800.0, torch.float32: -110.0}


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
    padding = -time % chunk_size
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
        if decay is not None and decay.dim() > 1:
            decay = F.pad(decay, (0, 0) * (decay.dim() - 2) + (0, padding))
    if decay is not None and decay.dim() == 4:
        out, state = _vector(q, k, v, decay, exclusive, state, chunk_size)
    else:
        out, state = _scalar(q, k, v, decay, exclusive, state, chunk_size, time)
    if exclusive and bonus is not None:
        out = out + _own_token(q, k, v, bonus)
    if scale != 1.0:
        out = out * scale
    return (out[:, :time] if padding else out).to(v.dtype), state


def _scalar(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, exclusive: bool, state: Tensor, chunk: int, time: int
) -> tuple[Tensor, Tensor]:
    """One decay per head and token (or per head, or none): the heads of a group share one score matrix."""
    batch, padded, groups = q.shape[:3]
    heads, value_dim = v.shape[2:]
    shape = (batch, padded // chunk, chunk, groups, heads // groups)
    q, k = (x.unflatten(1, shape[1:3]).transpose(2, 3) for x in (q, k))  # [batch, chunks, groups, C, K]
    v = v.reshape(*shape, value_dim)
    state = state.unflatten(1, shape[3:]).transpose(2, 3).flatten(3)  # [batch, groups, K, heads of the group * V]
    scores = q @ k.mT
    if decay is None:
        inside = _merge(scores.tril(-1 if exclusive else 0) @ _split(v))
        states, state = _pass_state(k.mT @ _split(v), None, state)
        out = inside + _merge(q @ states.to(q.dtype))
        return out.reshape(batch, padded, heads, value_dim), _state_by_head(state, value_dim)
    step, running = _running_decay(decay, shape, time, state.dtype)
    read = running - step if exclusive else running
    weights = (scores.unsqueeze(3) * _decay_between(read, running, exclusive)).to(v.dtype)
    inside = (weights @ v.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)
    total = running[:, :, -1:]
    faded = (v * _exp(total - running).unsqueeze(-1)).to(v.dtype)
    states, state = _pass_state(k.mT @ _split(faded), _exp(total[:, :, 0]), state)
    across = _merge(q @ states.to(q.dtype)).reshape(v.shape)
    out = torch.addcmul(inside, across, _exp(read).to(v.dtype).unsqueeze(-1))
    return out.reshape(batch, padded, heads, value_dim), _state_by_head(state, value_dim)


def _split(v: Tensor) -> Tensor:
    """[batch, chunks, C, groups, heads of the group, V] as one matrix per group: [batch, chunks, groups, C, heads * V]."""
    return v.flatten(4).transpose(2, 3)


def _merge(x: Tensor) -> Tensor:
    """The way back from `_split`, with the heads of a group still side by side."""
    return x.transpose(2, 3)


def _state_by_head(state: Tensor, value_dim: int) -> Tensor:
    """[batch, groups, K, heads of the group * V] as [batch, heads, K, V]."""
    return state.unflatten(3, (-1, value_dim)).transpose(2, 3).flatten(1, 2).contiguous()


def _running_decay(decay: Tensor, shape: tuple[int, ...], time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The log decay of each token and its running sum inside the chunk, [batch or 1, chunks or 1, C, groups, heads]."""
    _, chunks, chunk, groups, share = shape
    decay = decay.to(dtype).clamp(min=STRONGEST_DECAY[dtype])
    if decay.dim() == 1:
        decay = decay.view(1, 1, 1, groups, share).expand(1, 1, chunk, groups, share)
        if time < chunks * chunk:  # the padding after the last token must not fade the state
            real = torch.arange(chunks * chunk, device=decay.device).view(1, chunks, chunk, 1, 1) < time
            decay = torch.where(real, decay, 0.0)
    else:
        decay = decay.reshape(-1, *shape[1:])
    return decay, decay.cumsum(dim=2)


def _decay_between(read: Tensor, running: Tensor, exclusive: bool) -> Tensor:
    """e^(b_i - b_j) for every pair of tokens of a chunk, zero above the diagonal: [batch, chunks, groups, heads, C, C]."""
    chunk = running.shape[2]
    i, j = read.permute(0, 1, 3, 4, 2).unsqueeze(-1), running.permute(0, 1, 3, 4, 2).unsqueeze(-2)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=running.device).triu(0 if exclusive else 1)
    return _exp((i - j).masked_fill(future, -torch.inf))


def _exp(x: Tensor) -> Tensor:
    """e^x, and exactly zero where that is too small to matter."""
    return F.threshold(x, SMALLEST_EXPONENT[x.dtype], -torch.inf).exp()


def _pass_state(written: Tensor, kept: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Hands the state from chunk to chunk.

    Args:
        written: what each chunk adds, [batch, chunks, groups, K, heads * V].
        kept: what a chunk leaves of the state before it, [batch or 1, chunks or 1, groups, heads], or None for all;
            [batch, chunks, groups, K] with a vector decay.
        state: the state before the first chunk.

    Returns:
        the state before each chunk, and the state after the last.
    """
    chunks = written.shape[1]
    before = []
    if kept is not None:
        kept = _spread(kept, state).expand(-1, chunks, -1, -1, -1)
    for n in range(chunks):
        before.append(state)
        state = (
            state + written[:, n] if kept is None else torch.addcmul(written[:, n].to(state.dtype), kept[:, n], state)
        )
    return torch.stack(before, dim=1), state


def _spread(kept: Tensor, state: Tensor) -> Tensor:
    """[batch, chunks, groups, heads] to one factor per column of the state, [batch, chunks, groups, 1, heads * V]."""
    return kept.repeat_interleave(state.shape[-1] // kept.shape[-1], dim=-1).unsqueeze(-2)


def _vector(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, exclusive: bool, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """One decay per head, token and key channel: every head has its own scores."""
    heads, dtype = v.shape[2], state.dtype
    share = heads // q.shape[2]
    if share > 1:
        q, k = (x.repeat_interleave(share, dim=2) for x in (q, k))
    chunks = (q.shape[1] // chunk, chunk)
    q, k, v = (x.unflatten(1, chunks).transpose(2, 3) for x in (q, k, v))  # [batch, chunks, heads, C, K or V]
    decay = decay.to(dtype).clamp(min=STRONGEST_DECAY[dtype]).unflatten(1, chunks).transpose(2, 3)
    running = decay.cumsum(dim=3)
    read = running - decay if exclusive else running
    inside = _anchored_scores(q, k, read, running, exclusive) @ v
    total = running[:, :, :, -1:]
    written = (k * _exp(total - running)).to(k.dtype).mT @ v
    before = []
    for n in range(chunks[0]):
        before.append(state)
        state = torch.addcmul(written[:, n].to(dtype), total[:, n].mT.exp(), state)
    across = (q * _exp(read)).to(q.dtype) @ torch.stack(before, dim=1).to(q.dtype)
    return (inside + across).transpose(2, 3).flatten(1, 2), state


def _anchored_scores(q: Tensor, k: Tensor, read: Tensor, running: Tensor, exclusive: bool) -> Tensor:
    """A_ij = sum_d q_id k_jd e^(b_id - b_jd) on and below the diagonal, by halving: [batch, chunks, heads, C, C].

    Blocks of one token are the diagonal; two neighbouring blocks make one of twice the size by the product of the
    right one's queries with the left one's keys, anchored at the boundary between them.
    """
    chunk = q.shape[-2]
    own = torch.zeros_like(q[..., 0]) if exclusive else (q * k).sum(-1)
    blocks, size = own[..., None, None], 1
    while size < chunk:
        pairs = (chunk // (2 * size), 2, size)
        q_right, read_right = (x.unflatten(-2, pairs)[..., 1, :, :] for x in (q, read))
        k_left, running_left = (x.unflatten(-2, pairs)[..., 0, :, :] for x in (k, running))
        anchor = running_left[..., -1:, :]
        below = (q_right * _exp(read_right - anchor)).to(q.dtype) @ (k_left * _exp(anchor - running_left)).to(
            k.dtype
        ).mT
        left, right = blocks.unflatten(-3, pairs[:2]).unbind(-3)
        blocks = torch.cat([F.pad(left, (0, size)), torch.cat([below, right], dim=-1)], dim=-2)
        size *= 2
    return blocks.squeeze(-3)


def _own_token(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """What the current token adds through its bonus: (q . diag(u) k) v."""
    groups = q.shape[2]
    weight = (q * k).transpose(1, 2) @ bonus.to(q.dtype).unflatten(0, (groups, -1)).mT  # [batch, groups, time, heads]
    return weight.transpose(1, 2).flatten(2).unsqueeze(-1) * v


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
