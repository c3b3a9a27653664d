"""The delta rule under a moderate decay per head, or none: the fastest form, which only values and outputs feel.

Around the middle m of a chunk's decay c (`kernels/decay.py`), with V' = e^(m - c) V and S' = e^m S,

    U' = (I + β tril(K Kᵀ))⁻¹ β (V' - K S')      O = scale · e^(c - m) (Q S' + tril(Q Kᵀ) U')      S <- e^(c_C - m) (S' + Kᵀ U')

so heads that share queries and keys share their products: the states of a group lie side by side, [K, group · V], and one
product reads or writes them all. What is made for one chunk stays in a core's cache until that chunk is done.

Shapes inside: N chunks, J = batch · key heads, G heads in a group, C tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from archcompass.kernels.delta_rule.triangular import unit_lower_inverse
from archcompass.kernels.eager import plain_call
from archcompass.kernels.linear import products


class CentredTerms(NamedTuple):
    """What the state pass needs of each chunk.

    rows: [N, J, 2C, K], keys, then queries.
    values: [N, J, G, C, V], V' above.
    beta: [N, J, G, C, 1].
    inverse: [N, J · G, C, C].
    columns: [N, J, C, C + K], of each token written the scores of queries against it, then its key.
    coming_out: [N, J, C, G, 1], factor of the outputs, `scale` included; without a decay [N, 1, 1, 1, 1].
    passing: [N, J, 1, G · V], factor of the state after each chunk, or None.
    """

    rows: Tensor
    values: Tensor
    beta: Tensor
    inverse: Tensor
    columns: Tensor
    coming_out: Tensor
    passing: Tensor | None = None


def centred_terms(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *factors: Tensor, scale: float, precise: torch.dtype
) -> CentredTerms:
    """Terms of chunked inputs, [N, batch, heads, C, ...]; scores of keys and the inverse are in the dtype `precise`.

    `factors` are none or three: of values going in, outputs coming out, and the state passing on, the same in a whole chunk.
    """
    chunk, group = k.shape[-2], v.shape[2] // k.shape[2]
    working = torch.float32 if q.dtype == torch.float16 else q.dtype

    def by_group(x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (-1, group)).flatten(1, 2)

    rows = torch.cat([k, q], dim=-2).to(working).flatten(1, 2)
    among_keys, to_queries = _scores(rows, chunk, precise)
    strength = by_group(beta).to(precise).unsqueeze(-1)
    inverse = unit_lower_inverse(among_keys.unsqueeze(2) * strength)
    values = by_group(v).to(working)
    terms = CentredTerms(
        rows=rows,
        values=values,
        beta=strength.to(working),
        inverse=inverse.to(working).flatten(1, 2),
        columns=torch.cat([to_queries, rows[..., :chunk, :]], dim=-1),
        coming_out=rows.new_full((rows.shape[0], 1, 1, 1, 1), scale),
    )
    if not factors:
        return terms
    going_in, coming_out = (by_group(x).to(working).unsqueeze(-1) for x in factors[:2])
    passing = by_group(factors[2][..., :1]).expand(-1, -1, -1, v.shape[-1]).flatten(2).unsqueeze(-2)
    return terms._replace(values=values * going_in, coming_out=scale * coming_out.transpose(2, 3), passing=passing)


def _scores(rows: Tensor, chunk: int, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores of keys against keys, in `precise`, and against queries, [N, J, C, C] from rows [N, J, 2C, K].

    The product of bfloat16 numbers is a sum of exact float32 ones, so what its rounding took away, rounded, makes it good
    to sixteen bits: two products in bfloat16 take less than one in float32.
    """
    keys, queries = rows.split(chunk, dim=-2)
    if rows.dtype != torch.bfloat16 or not (rows.is_cpu and plain_call(rows)):
        wide = keys.to(precise)
        return wide @ wide.mT, (keys @ queries.mT).triu()
    keys = keys.contiguous()
    among, to_queries = (keys @ rows.mT).chunk(2, dim=-1)
    rest = torch.baddbmm(*(x.flatten(0, 1) for x in (among, keys, keys.mT)), beta=-1)
    return among.to(precise).add_(rest.view_as(among)), to_queries.triu()


def centred_pass(terms: CentredTerms, state: Tensor, give: Callable[[Tensor], None]) -> Tensor:
    """Carries the state S' [batch, heads, K, V] through the chunks to the last, giving away the outputs of each in turn,
    [batch, C, key heads, G, V].

    Where no graph is recorded the state is overwritten.
    """
    batch, group = state.shape[0], terms.values.shape[2]
    recorded = not plain_call(state, *terms)
    now = _side_by_side(torch.unflatten(state, 1, (-1, group)).flatten(0, 1))
    for n, coming_out in enumerate(terms.coming_out):
        out, added = _one_chunk(terms, n, now)
        now = now + added if recorded else now.add_(added)
        now = now if terms.passing is None else now.mul_(terms.passing[n])
        out = torch.unflatten(out, -1, (group, -1)) * coming_out
        give(torch.unflatten(out, 0, (batch, -1)).transpose(1, 2))
    return _by_head(now, group).reshape(state.shape)


def _one_chunk(terms: CentredTerms, n: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of chunk n, [J, C, G · V], before their factor, and what it adds to the state, [J, K, G · V]."""
    group, chunk = terms.values.shape[2:4]
    rows = terms.rows[n]
    predicted, read = products(rows, state.to(rows.dtype)).chunk(2, dim=-2)
    surprise = (terms.values[n] - _by_head(predicted, group)).mul_(terms.beta[n])
    written = terms.inverse[n] @ surprise.flatten(0, 1)
    written = _side_by_side(torch.unflatten(written, 0, (-1, group)))
    seen = products(terms.columns[n].mT, written)
    return read + seen[:, :chunk], seen[:, chunk:]


def _by_head(matrices: Tensor, group: int) -> Tensor:
    """[J, rows, G · V] as [J, G, rows, V]."""
    return torch.unflatten(matrices, -1, (group, -1)).transpose(1, 2)


def _side_by_side(matrices: Tensor) -> Tensor:
    """[J, G, rows, V] as [J, rows, G · V]."""
    return matrices.transpose(1, 2).flatten(2)
