"""torch's linear layer, by whichever of the libraries inside torch is fastest for it on this processor.

In float32 on the CPU `F.linear` always takes MKL. On an AMD processor that has half the speed of oneDNN, and reads the
matrix of a single row at half the speed of memory, where MKL's own batched product reads it at full speed. In bfloat16
oneDNN turns every matrix over before it multiplies, which for a single row takes longer than reading it; a matrix that
lies by columns is summed column by column instead. The precision is the same, the order of the sums another.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.kernels.eager import plain_call

FEW_ROWS = (
    4  # as many are served by one reading of the matrix (measured: 2 to 3 times F.linear up to here, slower from 6)
)
WORTH_A_CALL = 1 << 20  # multiply-adds; oneDNN takes 15 microseconds to start

_HAS_MKL, _HAS_ONEDNN = torch.backends.mkl.is_available(), torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b.

    Args:
        x: [..., in].
        weight: [out, in], in rows, or (best for single rows in bfloat16) in columns: strides (1, out).
        bias: [out], or None.

    Returns:
        [..., out] in the dtype of x.
    """
    if not x.is_cpu or not plain_call(x, weight, bias):
        return F.linear(x, weight, bias)
    rows, (columns, width) = x.numel() // max(x.shape[-1], 1), weight.shape
    if x.dtype is torch.float32 and weight.is_contiguous():
        if _HAS_MKL and 1 <= rows <= FEW_ROWS and columns % 2 == 0:
            return _few_rows(x, weight, bias)
        if _HAS_ONEDNN and rows * columns * width >= WORTH_A_CALL:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product
    elif x.dtype is torch.bfloat16 and rows == 1 and columns % 2 == 0 and weight.stride() == (1, columns):
        return _one_row(x, weight, bias)
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, written to `out`; matrices of any strides, of which no gradient is recorded."""
    if a.dtype is torch.float32 and a.is_cpu and _HAS_ONEDNN and a.shape[0] * b.numel() >= WORTH_A_CALL:
        return out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))
    return torch.mm(a, b, out=out)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a b of every pair of matrices, [..., M, K] and [..., K, N]."""
    large = a.shape[-2] * b.shape[-2] * b.shape[-1] >= WORTH_A_CALL
    if not (large and a.dtype is torch.float32 and a.is_cpu and plain_call(a, b)):
        return a @ b
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for left, right, place in zip(*(x.flatten(0, -3) for x in (a, b, out)), strict=True):
        product(left, right, place)
    return out


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The upper and the lower half of the matrix as a batch of two, on which MKL spends two threads."""
    columns, width = weight.shape
    rows = x.reshape(-1, width).t()
    y = torch.bmm(weight.view(2, columns // 2, width), rows.expand(2, -1, -1)).view(columns, -1)
    y = y.t().reshape(*x.shape[:-1], columns)
    return y if bias is None else y + bias


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_i x_i W_i over columns W_i, which is what embedding_bag sums, in float32; one bag for each half of a column."""
    columns, width = weight.shape
    table = weight.t().view(2 * width, columns // 2)
    y = F.embedding_bag(_bags(width), table, per_sample_weights=x.reshape(1, width).expand(2, -1), mode="sum")
    y = y.view(*x.shape[:-1], columns)
    return y if bias is None else y + bias


@lru_cache(maxsize=256)
def _bags(width: int) -> Tensor:
    """[2, width]: the upper halves of all columns, then the lower ones. An ordinary tensor even in inference mode."""
    with torch.inference_mode(False):
        return torch.arange(2 * width).view(width, 2).t().contiguous()
