"""Lower triangular blocks out of matrix products: decayed scores and the inverse of I + L, both by halving.

A lower triangular C x C matrix is a diagonal and, for m = 1, 2, 4, ... C/2, the m x m blocks where the later half of a
block of 2m rows meets its earlier half. That one picture serves twice:

- Scores under a vector decay, A_ij = Σ_k x_ik y_jk exp(c_ik - d_jk) for i >= j. One product over the whole chunk would need
  exp(-d_j), which overflows. Inside one block, anchored at the last row of the earlier half, both factors
  exp(c_i - anchor) and exp(anchor - d_j) have exponents that are never positive.
- The inverse [[A, 0], [X, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ X A⁻¹, D⁻¹]]: as stable as substitution, and no loop over rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

# exp(x) below these is nothing beside the terms that remain, and as a denormal number it would slow a CPU down.
SMALLEST_EXPONENT = {torch.float64: -700.0, torch.float32: -80.0}
# One token that forgets this much forgets all; a stronger decay would only cost the running sum its precision.
STRONGEST_DECAY = {torch.float64: -800.0, torch.float32: -110.0}


def running_sum(log_decay: Tensor, dim: int) -> Tensor:
    """Running sum of the log decay, each token held to the strongest that means anything."""
    return log_decay.clamp(min=STRONGEST_DECAY[log_decay.dtype]).cumsum(dim)


def decayed(log_factor: Tensor) -> Tensor:
    """exp of a log decay, exactly zero where it is too small to matter."""
    return threshold(log_factor, SMALLEST_EXPONENT[log_factor.dtype], -torch.inf).exp()


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + L)⁻¹ for a strictly lower triangular L [..., C, C], C a power of two; what lies above is ignored."""
    size = strict.shape[-1]
    inverse = strict.new_ones(*strict.shape[:-1], 1, 1)
    half = 1
    while half < size:
        earlier, later = _pairs(inverse, dim=-3)
        corner = -_corners(strict, half)
        if half > 1:
            corner = later @ (corner @ earlier)
        inverse = _assemble(earlier, corner, later)
        half *= 2
    return inverse.squeeze(-3)


def decay_matrix(cumulative: Tensor) -> Tensor:
    """exp(c_i - c_j) for i >= j: [..., C] to [..., C, C]. Above the diagonal it says 1 and means nothing.

    Exponents are held between the smallest that matters and 0, so nothing overflows and nothing is a denormal number.
    """
    apart = cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)
    return apart.clamp(SMALLEST_EXPONENT[apart.dtype], 0.0).exp()


def vector_decayed_scores(rows: Tensor, row_decay: Tensor, columns: Tensor, column_decay: Tensor) -> Tensor:
    """Every kind of row against every kind of column, under a decay per key dimension.

    Args:
        rows: [..., C, P, K], P kinds of rows (queries, keys).
        row_decay: [..., C, P or 1, K], running log decay a row has seen, c.
        columns: [..., C, Q, K], Q kinds of columns.
        column_decay: [..., C, 1, K], running log decay when a column was written, d.

    Returns:
        [..., C, P, C, Q], zero above the diagonal. The diagonal itself is x_i · y_i without decay: callers that want it
        strict mask it.
    """
    size, kinds, other = rows.shape[-3], rows.shape[-2], columns.shape[-2]
    scores = (rows.unsqueeze(-2) * columns.unsqueeze(-3)).sum(-1)
    half = 1
    while half < size:
        column_log = _halved(column_decay, half)[..., 0, :, :, :]
        anchor = column_log[..., -1:, :, :]
        late = _halved(rows, half)[..., 1, :, :, :] * decayed(_halved(row_decay, half)[..., 1, :, :, :] - anchor)
        early = _halved(columns, half)[..., 0, :, :, :] * decayed(anchor - column_log)
        corner = late.flatten(-3, -2) @ early.flatten(-3, -2).mT
        earlier, later = _pairs(scores, dim=-3)
        scores = _assemble(earlier, corner, later)
        half *= 2
    return scores.reshape(*rows.shape[:-3], size, kinds, size, other)


def _pairs(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Neighbouring blocks along `dim`, as (earlier, later)."""
    earlier, later = torch.unflatten(blocks, dim, (-1, 2)).unbind(dim)
    return earlier, later


def _halved(x: Tensor, half: int) -> Tensor:
    """[..., C, P, K] as [..., C / 2m, 2, m, P, K]."""
    return torch.unflatten(x, -3, (-1, 2, half))


def _corners(matrix: Tensor, half: int) -> Tensor:
    """The m x m blocks of a C x C matrix where a later half meets its earlier half: [..., C / 2m, m, m]."""
    pieces = (-1, 2, half)
    tiles = torch.unflatten(torch.unflatten(matrix, -1, pieces), -4, pieces)
    return tiles[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _assemble(earlier: Tensor, corner: Tensor, later: Tensor) -> Tensor:
    """[[earlier, 0], [corner, later]]."""
    return torch.cat([pad(earlier, (0, corner.shape[-1])), torch.cat([corner, later], dim=-1)], dim=-2)
