"""The inverse of I + L for a strictly lower triangular L, out of matrix products, by halving.

A lower triangular C x C matrix is a diagonal and, for m = 1, 2, 4, ... C/2, the m x m blocks where the later half of a
block of 2m rows meets its earlier half: [[A, 0], [X, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ X A⁻¹, D⁻¹]]. As stable as substitution,
and no loop over rows.
"""

from torch import Tensor, unflatten

from archcompass.kernels.decay import assemble, pairs


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + L)⁻¹ for a strictly lower triangular L [..., C, C], C a power of two; what lies above is ignored."""
    size = strict.shape[-1]
    inverse = strict.new_ones(*strict.shape[:-1], 1, 1)
    half = 1
    while half < size:
        earlier, later = pairs(inverse)
        corner = -_corners(strict, half)
        if half > 1:
            corner = later @ (corner @ earlier)
        inverse = assemble(earlier, later, corner)
        half *= 2
    return inverse.squeeze(-3)


def _corners(matrix: Tensor, half: int) -> Tensor:
    """The m x m blocks of a C x C matrix where a later half meets its earlier half: [..., C / 2m, m, m]."""
    pieces = (-1, 2, half)
    tiles = unflatten(unflatten(matrix, -1, pieces), -4, pieces)
    return tiles[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
