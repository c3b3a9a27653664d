"""The delta rule as matrix products over chunks of C tokens: what a CPU runs, forward and backward.

With c_i the running sum of the log decay inside a chunk and S the state at its start (Yang et al. 2024, arXiv 2406.06484 and
2412.06464; Kimi Linear, arXiv 2510.26692):

    L_ij = β_i (k_i · k_j) exp(c_i - c_j)          i > j
    U    = (I + L)⁻¹ (β V - (β K exp(c)) S)        what is really written at each token (V' in the papers)
    O    = scale · ((Q exp(c)) S + A U)            A_ij = (q_i · k_j) exp(c_i - c_j), i >= j
    S'   = exp(c_C) S + (K exp(c_C - c))ᵀ U

RWKV-7 (arXiv 2503.14456) has the same form with a for -βk, b for k, and values of its own besides:

    Z  = (I - A_ab)⁻¹ (A_ak V + (A exp(c - g)) S)
    O  = scale · ((Q exp(c)) S + A_qb Z + A_qk V)
    S' = exp(c_C) S + (B exp(c_C - c))ᵀ Z + (K exp(c_C - c))ᵀ V

so one state pass serves both. A decay per head that stays moderate inside a chunk, or none, has a faster form of its own,
`centred.py`; heads that decay too strongly for it are then made again, exactly.

Only the state pass is sequential, over chunks; the rest is batched over a segment of SEGMENT tokens, which keeps its
arrays in the cache and bounds memory in inference.

Shapes inside: N chunks, J = batch · heads, C tokens, [N, J, C, D]. Products run in the inputs' precision (float16 in
float32: CPUs have no float16 products), decays, inverse and state in float32, or float64 for float64 inputs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from archcompass.kernels.decay import (
    centred,
    decay_matrix,
    decayed,
    made_again,
    moderated,
    running_sum,
    strong_heads,
    vector_decayed_scores,
)
from archcompass.kernels.delta_rule.centred import centred_pass, centred_terms
from archcompass.kernels.delta_rule.triangular import unit_lower_inverse
from archcompass.kernels.eager import plain_call

SEGMENT = 512
# Where more than one head in this many decays strongly, the exact form serves them all.
FEW = 4

Terms = TypeVar("Terms")


class ChunkTerms(NamedTuple):
    """What the state pass needs of each chunk; the first dimension counts chunks.

    rows: [N, J, 2C, K], the keys that predict (with their beta), then the queries.
    target: [N, J, C, V], what the prediction is taken from.
    inverse: [N, J, C, C].
    mix: [N, J, C, C], scores of queries against what is written.
    tail: [N, J, R, K], keys under which it is written, decayed to the end of the chunk; R is C, or 2C with `values`.
    decay: [N, J, K or 1, 1] over the whole chunk, of the state before it, or None.
    out: [N, J, C, V] to be added to the output, or None.
    values: [N, J, C, V] written besides under the second half of `tail`, or None.
    """

    rows: Tensor
    target: Tensor
    inverse: Tensor
    mix: Tensor
    tail: Tensor
    decay: Tensor | None = None
    out: Tensor | None = None
    values: Tensor | None = None


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Matmul form; arguments as in `archcompass.kernels.delta_rule.delta_rule`, with every default filled in."""
    run = partial(_through_segments, scale=scale, chunk=chunk)
    if log_decay is not None and log_decay.dim() == 4:
        return run(vector_terms, state_pass, [q, k, v, beta, log_decay], state)
    if log_decay is None:
        return run(centred_terms, centred_pass, [q, k, v, beta], state.clone())
    log_decay = log_decay.to(state.dtype)
    by_chunk = pad(log_decay, (0, 0, 0, -log_decay.shape[1] % chunk)).unflatten(1, (-1, chunk))
    strong = strong_heads(by_chunk)
    exactly = partial(run, scalar_terms, state_pass, [q, k, v, beta, log_decay], state)
    if strong is None:
        return exactly()
    if FEW * strong.numel() > v.shape[2]:
        return made_again(exactly)
    going_in, coming_out, passing = centred(moderated(by_chunk, strong))
    factors = [x.flatten(1, 2) for x in (going_in, coming_out, passing[:, 1:, None].expand(by_chunk.shape))]
    out, last = run(centred_terms, centred_pass, [q, k, v, beta, *factors], state * passing[:, 0, :, None, None])
    if not strong.numel():
        return out, last
    theirs = [x[:, :, strong // (v.shape[2] // k.shape[2])] for x in (q, k)]
    theirs += [x[:, :, strong] for x in (v, beta, log_decay)]
    exact, after = made_again(partial(run, scalar_terms, state_pass, theirs, state[:, strong]))
    return out.index_copy(2, strong, exact), last.index_copy(1, strong, after)


def dplr_chunked(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Matmul form; arguments as in `archcompass.kernels.delta_rule.dplr`, with every default filled in."""
    return _through_segments(dplr_terms, state_pass, [q, k, v, a, b, log_decay], state, scale=scale, chunk=chunk)


def _through_segments(
    terms: Callable[..., Terms],
    carry: Callable[[Terms, Tensor, Callable[[Tensor], None]], Tensor],
    inputs: Sequence[Tensor],
    state: Tensor,
    *,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The outputs, [batch, time, heads, V], and the last state. The third of the inputs are the values.

    Where no graph is recorded each chunk's outputs go to their place at once: pieces and whole never lie side by side.
    """
    like = inputs[2]
    pieces: list[Tensor] = []
    whole = like.new_empty(like.shape) if plain_call(state, *inputs) else None
    give = pieces.append if whole is None else _written_to(whole)
    for segment in _segments(inputs, chunk):
        state = carry(terms(*segment, scale=scale, precise=state.dtype), state, give)
    return _join(pieces, like) if whole is None else whole, state


def _written_to(whole: Tensor) -> Callable[[Tensor], None]:
    """Writes pieces [batch, C, heads or key heads and group, V] one after the other; what is padded at the end has no place."""
    done = 0

    def write(piece: Tensor) -> None:
        nonlocal done
        place = whole[:, done : done + piece.shape[1]]
        torch.unflatten(place, 2, piece.shape[2:-1]).copy_(piece[:, : place.shape[1]])
        done += place.shape[1]

    return write


def _segments(inputs: Sequence[Tensor], chunk: int) -> list[list[Tensor]]:
    """Each input as pieces of whole chunks, [N, batch, heads, C, ...]; the tail is padded with zeros, which write nothing."""
    length = max(SEGMENT, chunk)
    time = inputs[0].shape[1]
    return [[_to_chunks(x[:, start : start + length], chunk) for x in inputs] for start in range(0, time, length)]


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    if missing := -x.shape[1] % chunk:
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return torch.unflatten(x, 1, (-1, chunk)).movedim(3, 2).movedim(1, 0)


def _join(outputs: list[Tensor], like: Tensor) -> Tensor:
    if not outputs:
        return like.new_empty(like.shape)
    return torch.cat(outputs, dim=1)[:, : like.shape[1]].reshape(like.shape).to(like.dtype)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def scalar_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float,
    precise: torch.dtype,
) -> ChunkTerms:
    """Terms under one decay per head. Products of q and k are made once per key head.

    Inputs are chunked, [N, batch, heads, C, ...]; decays and the inverse are computed in the dtype `precise`.
    """
    working = _working(q.dtype)
    group = v.shape[2] // k.shape[2]
    beta = beta.to(precise)
    cumulative = beta.new_zeros(()).expand_as(beta) if log_decay is None else running_sum(log_decay.to(precise), -1)
    relative, beta, cumulative = (
        torch.unflatten(x, 2, (-1, group)) for x in (decay_matrix(cumulative, cumulative), beta, cumulative)
    )
    q, k, v = (x.to(working) for x in (q, k, v))
    precise_k = k.to(precise)
    among_keys = (precise_k @ precise_k.mT).unsqueeze(3) * (relative * beta.unsqueeze(-1))
    seen = torch.ones(q.shape[-2], q.shape[-2], dtype=working, device=q.device).tril()
    mix = ((scale * q) @ k.mT * seen).unsqueeze(3) * relative.to(working)
    since_start, until_end = decayed(cumulative), decayed(cumulative[..., -1:] - cumulative)

    def weighted(x: Tensor, weight: Tensor) -> Tensor:
        return x.unsqueeze(3) * weight.to(working).unsqueeze(-1)

    rows = torch.cat([weighted(k, beta * since_start), weighted(q, scale * since_start)], dim=-2)
    return ChunkTerms(
        rows=rows.flatten(1, 3),
        target=(torch.unflatten(v, 2, (-1, group)) * beta.to(working).unsqueeze(-1)).flatten(1, 3),
        inverse=unit_lower_inverse(among_keys.flatten(1, 3)).to(working),
        mix=mix.flatten(1, 3),
        tail=weighted(k, until_end).flatten(1, 3),
        decay=None if log_decay is None else since_start[..., -1].flatten(1, 3)[..., None, None],
    )


def vector_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float,
    precise: torch.dtype,
) -> ChunkTerms:
    """Terms under a decay per key dimension."""
    assert log_decay is not None
    working = _working(q.dtype)
    group = v.shape[2] // k.shape[2]
    q, k = (x.to(precise).repeat_interleave(group, dim=2).flatten(1, 2) for x in (q, k))
    beta = beta.to(precise).flatten(1, 2).unsqueeze(-1)
    cumulative = running_sum(log_decay.to(precise), -2).flatten(1, 2)
    along = cumulative.unsqueeze(-2)
    scores = vector_decayed_scores(torch.stack([k, q], dim=-2), along, k.unsqueeze(-2), along)
    among_keys, mix = scores.squeeze(-1).unbind(-2)
    since_start, until_end = decayed(cumulative), decayed(cumulative[..., -1:, :] - cumulative)
    rows = torch.cat([beta * k * since_start, scale * q * since_start], dim=-2)
    return ChunkTerms(
        rows=rows.to(working),
        target=(v.flatten(1, 2) * beta).to(working),
        inverse=unit_lower_inverse(beta * among_keys).to(working),
        mix=(scale * mix).to(working),
        tail=(k * until_end).to(working),
        decay=since_start[..., -1, :].unsqueeze(-1),
    )


def dplr_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    precise: torch.dtype,
) -> ChunkTerms:
    """Terms of the diagonal plus low-rank form. Rows a read the state before this token's decay, rows q after it."""
    working = _working(q.dtype)
    q, k, a, b, log_decay = (x.to(precise).flatten(1, 2) for x in (q, k, a, b, log_decay))
    v = v.to(working).flatten(1, 2)
    cumulative = running_sum(log_decay, -2)
    before = pad(cumulative, (0, 0, 1, -1))
    scores = vector_decayed_scores(
        torch.stack([a, scale * q], dim=-2),
        torch.stack([before, cumulative], dim=-2),
        torch.stack([k, b], dim=-2),
        cumulative.unsqueeze(-2),
    )
    (a_k, a_b), (q_k, q_b) = ((pair[..., 0], pair[..., 1]) for pair in scores.unbind(-3))
    of_values = torch.cat([a_k.tril(-1), q_k], dim=-2).to(working) @ v
    target, out = of_values.chunk(2, dim=-2)
    until_end = decayed(cumulative[..., -1:, :] - cumulative)
    return ChunkTerms(
        rows=torch.cat([-a * decayed(before), scale * q * decayed(cumulative)], dim=-2).to(working),
        target=target,
        inverse=unit_lower_inverse(-a_b).to(working),
        mix=q_b.to(working),
        tail=torch.cat([b * until_end, k * until_end], dim=-2).to(working),
        decay=decayed(cumulative[..., -1, :]).unsqueeze(-1),
        out=out,
        values=v,
    )


def state_pass(terms: ChunkTerms, state: Tensor, give: Callable[[Tensor], None]) -> Tensor:
    """Carries the state through the chunks to the last, giving away the outputs of each in turn, [batch, C, heads, V]."""
    shape = state.shape
    state = state.flatten(0, 1)
    for n in range(terms.rows.shape[0]):
        predicted, read = (terms.rows[n] @ state.to(terms.rows.dtype)).chunk(2, dim=-2)
        written = terms.inverse[n] @ (terms.target[n] - predicted)
        out = torch.baddbmm(read, terms.mix[n], written)
        out = out if terms.out is None else out + terms.out[n]
        give(torch.unflatten(out, 0, shape[:2]).transpose(1, 2))
        if terms.values is not None:
            written = torch.cat([written, terms.values[n]], dim=-2)
        added = terms.tail[n].mT @ written
        kept = terms.decay
        state = state + added if kept is None else torch.addcmul(added.to(state.dtype), state, kept[n])
    return state.view(shape)
