"""The delta rule under a moderate decay per head, or none: the fastest form, which only values and outputs feel.

Around the middle m of a chunk's decay c (`kernels/decay.py`), with V' = e^(m - c) V and S' = e^m S,

    U' = (I + β tril(K Kᵀ))⁻¹ β (V' - K S')      O = scale · e^(c - m) (Q S' + tril(Q Kᵀ) U')      S <- e^(c_C - m) (S' + Kᵀ U')

so heads that share queries and keys share their products: the states of a group lie side by side, [K, group · V], and one
product reads or writes them all. What is made for one chunk stays in a core's cache until that chunk is done.

Shapes inside: N chunks, J = batch · key heads, G heads in a group, C tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from archcompass.kernels.decay import centred
from archcompass.kernels.delta_rule.triangular import unit_lower_inverse
from archcompass.kernels.linear import products


class CentredTerms(NamedTuple):
    """What the state pass needs of each chunk.

    rows: [N, J, 2C, K], keys, then queries.
    values: [N, J, G, C, V].
    beta: [N, J, G, C, 1].
    inverse: [N, J · G, C, C].
    mix: [N, J, C, C], scores of queries against what is written.
    coming_out: [N, J, C, G, 1], factor of the outputs, `scale` included; without a decay [N, 1, 1, 1, 1].
    going_in: [N, J, G, C, 1], factor of the values, or None.
    passing: [N + 1, J, 1, G · V], factors of the states before the first chunk and after each, or None.
    """

    rows: Tensor
    values: Tensor
    beta: Tensor
    inverse: Tensor
    mix: Tensor
    coming_out: Tensor
    going_in: Tensor | None = None
    passing: Tensor | None = None


def centred_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float,
    precise: torch.dtype,
) -> CentredTerms:
    """Terms of chunked inputs, [N, batch, heads, C, ...]; decays and the inverse are computed in the dtype `precise`."""
    chunk, group = k.shape[-2], v.shape[2] // k.shape[2]
    working = torch.float32 if q.dtype == torch.float16 else q.dtype

    def by_group(x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (-1, group)).flatten(1, 2)

    rows = torch.cat([k, q], dim=-2).to(working).flatten(1, 2)
    keys, queries = rows.split(chunk, dim=-2)
    precise_keys, strength = keys.to(precise), by_group(beta).to(precise).unsqueeze(-1)
    among_keys = (precise_keys @ precise_keys.mT).unsqueeze(2) * strength
    terms = CentredTerms(
        rows=rows,
        values=by_group(v).to(working),
        beta=strength.to(working),
        inverse=unit_lower_inverse(among_keys).to(working).flatten(1, 2),
        mix=(queries @ keys.mT).tril(),
        coming_out=rows.new_full((rows.shape[0], 1, 1, 1, 1), scale),
    )
    if log_decay is None:
        return terms
    factors = centred(log_decay.to(precise).permute(1, 0, 3, 2))
    going_in, coming_out = (by_group(x.permute(1, 0, 3, 2)).to(working).unsqueeze(-1) for x in factors[:2])
    passing = by_group(factors.passing.transpose(0, 1)).repeat_interleave(v.shape[-1], dim=-1).unsqueeze(-2)
    return terms._replace(going_in=going_in, coming_out=scale * coming_out.transpose(2, 3), passing=passing)


def centred_pass(terms: CentredTerms, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Carries the state [batch, heads, K, V] through the chunks: each one's outputs, [batch, C, heads, V], and the last."""
    batch, group = state.shape[0], terms.values.shape[2]
    now = _side_by_side(torch.unflatten(state, 1, (-1, group)).flatten(0, 1))
    if terms.passing is not None:
        now = now * terms.passing[0]
    outputs = []
    for n in range(terms.rows.shape[0]):
        out, now = _one_chunk(terms, n, now)
        outputs.append(torch.unflatten(out, 0, (batch, -1)).transpose(1, 2).flatten(2, 3))
    return outputs, _by_head(now, group).reshape(state.shape)


def _one_chunk(terms: CentredTerms, n: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of chunk n, [J, C, G, V], and the state as it enters the next one, [J, K, G · V]."""
    group, chunk = terms.values.shape[2:4]
    rows = terms.rows[n]
    predicted, read = products(rows, state.to(rows.dtype)).split(chunk, dim=-2)
    target = terms.values[n] if terms.going_in is None else terms.values[n] * terms.going_in[n]
    surprise = (target - _by_head(predicted, group)) * terms.beta[n]
    written = terms.inverse[n] @ surprise.flatten(0, 1)
    written = _side_by_side(torch.unflatten(written, 0, (-1, group)))
    out = torch.unflatten(torch.baddbmm(read, terms.mix[n], written), -1, (group, -1)) * terms.coming_out[n]
    state = (rows[:, :chunk].mT @ written).to(state.dtype).add_(state)  # a mixed sum takes four times as long
    return out, state if terms.passing is None else state.mul_(terms.passing[n + 1])


def _by_head(matrices: Tensor, group: int) -> Tensor:
    """[J, rows, G · V] as [J, G, rows, V]."""
    return torch.unflatten(matrices, -1, (group, -1)).transpose(1, 2)


def _side_by_side(matrices: Tensor) -> Tensor:
    """[J, G, rows, V] as [J, rows, G · V]."""
    return matrices.transpose(1, 2).flatten(2)
