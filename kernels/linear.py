"""torch's linear layer, by whichever of the libraries inside torch is fastest for it on this processor.

In float32 on the CPU `F.linear` always takes MKL. On an AMD processor that has half the speed of oneDNN, and reads the
matrix of a single row at half the speed of memory, where MKL's own batched product reads it at three quarters. In bfloat16
oneDNN turns every matrix over before it multiplies, which for a single row takes longer than reading it. Of a matrix that
lies by columns a single row sums columns, in both types at the speed of memory. The precision is the same, the order of the
sums another.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.kernels import pages
from archcompass.kernels.eager import plain_call

FEW_ROWS = 4  # served by one reading of the matrix (measured: 2 to 3 times F.linear up to here, slower from 6)
WORTH_A_CALL = 1 << 20  # multiply-adds; oneDNN takes 15 microseconds to start
WORTH_HALVING = 1 << 16  # elements of a matrix; MKL's batched product takes 5 microseconds or more to be called
WORTH_A_THREAD = 1 << 17  # elements of a matrix that one thread sums in the time that waking another takes
BY_COLUMNS = (torch.float32, torch.bfloat16)  # of which torch has a fast sum of scaled rows

_HAS_MKL, _HAS_ONEDNN = torch.backends.mkl.is_available(), torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b.

    Args:
        x: [..., in].
        weight: [out, in], in rows, or (best for single rows) in columns: strides (1, out).
        bias: [out], or None.

    Returns:
        [..., out] in the dtype of x.
    """
    if not x.is_cpu or not plain_call(x, weight, bias):
        return F.linear(x, weight, bias)
    rows, (columns, width) = x.numel() // max(x.shape[-1], 1), weight.shape
    by_rows, by_columns = weight.is_contiguous(), weight.stride() == (1, columns)
    if rows == 1 and by_columns and x.dtype in BY_COLUMNS:
        return _one_row(x, weight, bias)
    if x.dtype is torch.float32 and (by_rows or by_columns):
        if _HAS_MKL and by_rows and 1 <= rows <= FEW_ROWS and columns % 2 == 0 and columns * width >= WORTH_HALVING:
            return _few_rows(x, weight, bias)
        if _HAS_ONEDNN and rows * columns * width >= WORTH_A_CALL:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product
    return F.linear(x, weight, bias)


def linears(inputs: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """x Wᵀ of each pair in one call, for single rows and matrices that lie as `together` lays them.

    Args:
        inputs: [matrices, ..., in].
        weights: [out, in] each, of any number of columns.

    Returns:
        [..., out] of each pair; None where the products are the caller's to make, one by one.
    """
    first, count, width = weights[0], len(weights), inputs.shape[-1]
    if inputs.dtype not in BY_COLUMNS or inputs.numel() != count * width or not inputs.is_cpu:
        return None
    if not (plain_call(inputs, *weights) and _lie_together(weights)):
        return None
    columns = tuple(weight.shape[0] for weight in weights)
    piece = math.gcd(*columns)
    piece //= _parts(piece, width * sum(columns) // piece)
    rows, offsets, whose = _pieces(width, columns, piece)
    table = first.as_strided((len(rows), piece), (piece, 1))
    y = summed_rows(table, rows, offsets, inputs.view(count, width).index_select(0, whose).view(-1))
    if len(set(columns)) == 1:
        return y.view(count, *inputs.shape[1:-1], -1).unbind()
    return [part.view(*inputs.shape[1:-1], -1) for part in y.view(-1).split(columns)]


def together(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same matrices [..., out, in] of one dtype by columns, in one memory and in this order, one after the other."""
    sizes = [weight.numel() for weight in weights]
    if not sizes:
        return
    for weight, part in zip(weights, pages.empty(sum(sizes), weights[0].dtype).split(sizes), strict=True):
        yield part.view(weight.mT.shape).mT.copy_(weight)


def _lie_together(weights: Sequence[Tensor]) -> bool:
    """Whether matrices lie by columns in one memory, each where the one before it ends."""
    memory, end = weights[0].untyped_storage().data_ptr(), weights[0].storage_offset()
    for weight in weights:
        if weight.dtype is not weights[0].dtype or weight.stride() != (1, weight.shape[0]):
            return False
        if weight.storage_offset() != end or weight.untyped_storage().data_ptr() != memory:
            return False
        end += weight.numel()
    return True


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, written to `out`; matrices of any strides, of which no gradient is recorded."""
    if a.dtype is torch.float32 and a.is_cpu and _HAS_ONEDNN and a.shape[0] * b.numel() >= WORTH_A_CALL:
        return out.copy_(_by_onednn(a, b))
    return torch.mm(a, b, out=out)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a b of every pair of matrices, [..., M, K] and [..., K, N]."""
    large = a.shape[-2] * b.shape[-2] * b.shape[-1] >= WORTH_A_CALL and _HAS_ONEDNN
    if not (large and a.dtype is torch.float32 and a.is_cpu and plain_call(a, b)):
        return a @ b
    if a.shape[:-2].numel() == 1:
        return _by_onednn(a.flatten(0, -2), b.flatten(0, -2)).view(*a.shape[:-1], b.shape[-1])
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for left, right, place in zip(*(x.flatten(0, -3) for x in (a, b, out)), strict=True):
        product(left, right, place)
    return out


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices. A b cut out of a wider matrix is copied: oneDNN would take a thousand times as long."""
    b = b if b.t().is_contiguous() else b.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return y


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The upper and the lower half of the matrix as a batch of two, on which MKL spends two threads."""
    columns, width = weight.shape
    rows = x.reshape(1, -1, width).expand(2, -1, -1).mT
    y = torch.bmm(weight.view(2, columns // 2, width), rows).view(columns, -1)
    y = y.t().reshape(*x.shape[:-1], columns)
    return y if bias is None else y + bias


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_i x_i W_i over columns W_i, each thread its part of them."""
    columns, width = weight.shape
    parts = _parts(columns, width)
    y = summed_rows(weight.t().view(parts * width, columns // parts), *bags(width, parts), repeated(x, parts))
    y = y.view(*x.shape[:-1], columns)
    return y if bias is None else y + bias


def summed_rows(table: Tensor, index: Tensor, offsets: Tensor, scales: Tensor) -> Tensor:
    """Σ scale · row over each bag's rows of a table [rows, columns], in float32: [bags, columns].

    torch's operator itself, as F.embedding_bag takes ten microseconds before it calls it.

    Args:
        index, scales: of every bag's rows, one bag after the other; int64, and in the table's dtype.
        offsets: [bags] where each begins.
    """
    return torch.embedding_bag(table, index, offsets, mode=0, per_sample_weights=scales)[0]


def sum_of_rows(table: Tensor, index: Tensor, scales: Tensor) -> Tensor:
    """`summed_rows` of one bag, each thread its part of the columns: [columns]."""
    columns, width = table.shape[1], index.numel()
    parts = _parts(columns, width)
    index = index if parts == 1 else (index * parts + torch.arange(parts)[:, None]).flatten()
    return summed_rows(table.view(-1, columns // parts), index, bags(width, parts)[1], repeated(scales, parts)).view(-1)


def repeated(x: Tensor, times: int) -> Tensor:
    """The elements of x in a row, `times` over."""
    x = x.reshape(-1)
    return x if times == 1 else torch.cat([x] * times)


@lru_cache(maxsize=256)
def bags(width: int, parts: int) -> tuple[Tensor, Tensor]:
    """`width` rows in `parts` parts: first parts of all, second parts, and so on, and where each bag begins.

    Ordinary tensors even when first asked for in inference mode.
    """
    with torch.inference_mode(False):
        rows = torch.arange(parts * width).view(width, parts).t().flatten()
        return rows, torch.arange(0, parts * width, width)


@lru_cache(maxsize=256)
def _pieces(width: int, columns: tuple[int, ...], piece: int) -> tuple[Tensor, Tensor, Tensor]:
    """`bags` of matrices behind one another, cut into pieces of their columns; and which matrix each piece is of."""
    times = [count // piece for count in columns]
    with torch.inference_mode(False):
        rows = [bags(width, n)[0] + width * sum(times[:before]) for before, n in enumerate(times)]
        whose = torch.arange(len(columns)).repeat_interleave(torch.tensor(times))
        return torch.cat(rows), torch.arange(0, width * sum(times), width), whose


def _parts(columns: int, width: int) -> int:
    """Equal parts of `columns`, one for each thread that has enough to do: a power of two."""
    threads = min(torch.get_num_threads(), columns * width // WORTH_A_THREAD)
    return math.gcd(columns, 1 << (threads.bit_length() - 1)) if threads > 1 else 1
