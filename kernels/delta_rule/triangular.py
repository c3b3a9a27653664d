"""The inverse of I + L for a strictly lower triangular L, out of matrix products, by halving.

A lower triangular C x C matrix is a diagonal and, for m = 1, 2, 4, ... C/2, the m x m blocks where the later half of a
block of 2m rows meets its earlier half: [[A, 0], [X, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ X A⁻¹, D⁻¹]]. As stable as substitution,
and no loop over rows. Of Y = (I + L)⁻¹ the gradient is dL = -Yᵀ dY Yᵀ, below the diagonal.
"""

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.delta_rule.cost import inverse_flops
from archcompass.kernels.eager import plain_call


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + L)⁻¹ for a strictly lower triangular L [..., C, C], C a power of two; what lies above is ignored."""
    return _by_halving(strict) if plain_call(strict) else unit_lower_inverse_op(strict)


@torch.library.custom_op("archcompass::unit_lower_inverse", mutates_args=())
def unit_lower_inverse_op(strict: Tensor) -> Tensor:
    """The same as one operator, so that autograd keeps the result and nothing of the way there."""
    return _by_halving(strict).contiguous()


@unit_lower_inverse_op.register_fake
def _(strict: Tensor) -> Tensor:
    return strict.new_empty(strict.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    inverse = ctx.saved_tensors[0].mT
    # Above the diagonal the inverse is zero whatever L is, and its gradient, e^(c_i - c_j) for i < j, may overflow.
    return -(inverse @ grad.tril() @ inverse).tril(-1)


unit_lower_inverse_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.archcompass.unit_lower_inverse)
def _flops(strict_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    *batch, size, _ = strict_shape
    return int(prod(batch) * inverse_flops(size))


def _by_halving(strict: Tensor) -> Tensor:
    """Each matrix takes C (C + 1) places, so that the blocks of all matrices lie equally far apart: one batch of products."""
    size, batch = strict.shape[-1], strict.shape[:-2]
    inverse = strict.new_empty(*batch, size * (size + 1))
    torch.mul(strict, strict.new_full((size, size), -1).tril_(-1), out=_square(inverse, size))
    inverse.as_strided((inverse.numel() // (size + 1),), (size + 1,)).fill_(1)
    half = 2  # of a block of two rows the inverse is I - L, as it lies there
    while half < size:
        corner = _blocks(inverse, size, half, 1, 0)
        corner.copy_(_blocks(inverse, size, half, 1, 1) @ (corner @ _blocks(inverse, size, half, 0, 0)))
        half *= 2
    return _square(inverse, size)


def _square(matrices: Tensor, size: int) -> Tensor:
    """[..., C (C + 1)] as [..., C, C]."""
    return torch.unflatten(matrices[..., : size * size], -1, (size, size))


def _blocks(matrices: Tensor, size: int, half: int, row: int, column: int) -> Tensor:
    """Of every block of 2m rows on the diagonal of every matrix one quarter, [matrices · C / 2m, m, m]."""
    count = matrices.numel() // (size + 1) // (2 * half)
    return matrices.as_strided((count, half, half), (2 * half * (size + 1), size, 1), (row * size + column) * half)
