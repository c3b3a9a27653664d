"""The head and its loss on the GPU in one: a tile of logits lives in registers and nowhere else.

Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009). Forward: each program walks a share of the vocabulary with a
running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867), and leaves two numbers a token. Backward: tiles of
logits again, of which the gradient is written for a chunk of the vocabulary at a time; what follows is torch's matrix
products, and a chunk of the head's gradient is whole at once, without a float32 sum of the head's size. No atomics.
Compute-bound: 2 FLOPs per token, word and width forward, 6 backward, a third of them the logits once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.cross_entropy.tiles import LOGITS
from archcompass.kernels.tiles import Tile

PROGRAMS_WANTED = 264  # two for each multiprocessor of an H100


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, token, word, tokens, vocab, hidden_row, weight_row, scale, soft_cap,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of scaled and capped logits, and their derivative by the plain products."""
    d = tl.arange(0, BLOCK_D)
    hidden_at = hidden_ptr + token[:, None] * hidden_row + d[None, :]
    weight_at = weight_ptr + word[None, :] * weight_row + d[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        inside = d < WIDTH - start
        hidden = tl.load(hidden_at, mask=(token < tokens)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=(word < vocab)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(hidden, weight, acc, input_precision=PRECISION)
        hidden_at += BLOCK_D
        weight_at += BLOCK_D
    shaped = acc * scale
    slope = tl.full((BLOCK_T, BLOCK_V), 1.0, tl.float32) * scale
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * shaped / soft_cap) - 1.0
        shaped = soft_cap * bent
        slope = scale * (1.0 - bent * bent)
    return shaped, slope


@triton.jit(do_not_specialize=["tokens", "per_split"])
def _loss_forward_kernel(
    hidden_ptr, weight_ptr, targets_ptr, lse_ptr, hit_ptr, hidden_row, weight_row, tokens, vocab, per_split,
    scale, soft_cap,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over one share of the vocabulary, and the target's logit where it lies in it (else 0)."""
    part = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + token, mask=token < tokens, other=-1)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    hit = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(part * per_split, tl.minimum(vocab, (part + 1) * per_split), BLOCK_V):
        word = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_V)
        shaped, _slope = _logits(
            hidden_ptr, weight_ptr, token, word, tokens, vocab, hidden_row, weight_row, scale, soft_cap,
            WIDTH, CAPPED, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        hit += tl.sum(tl.where(word[None, :] == target[:, None], shaped, 0.0), axis=1)
        shaped = tl.where((word < vocab)[None, :], shaped, float("-inf"))
        higher = tl.maximum(top, tl.max(shaped, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(shaped - higher[:, None]), axis=1)
        top = higher
    at = token * tl.num_programs(1) + part
    tl.store(lse_ptr + at, top + tl.log(total), mask=token < tokens)
    tl.store(hit_ptr + at, hit, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "first", "columns"])
def _loss_slope_kernel(
    hidden_ptr, weight_ptr, targets_ptr, lse_ptr, share_ptr, slope_ptr, hidden_row, weight_row, tokens, vocab, first,
    columns, scale, soft_cap,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ share loss differentiated by the plain products, for `columns` words from `first` on."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    word = tl.cast(first, tl.int64) + column
    there = token < tokens
    target = tl.load(targets_ptr + token, mask=there, other=-1)
    log_sum = tl.load(lse_ptr + token, mask=there, other=0.0)
    share = tl.load(share_ptr + token, mask=there, other=0.0)
    shaped, slope = _logits(
        hidden_ptr, weight_ptr, token, word, tokens, vocab, hidden_row, weight_row, scale, soft_cap,
        WIDTH, CAPPED, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    wrong = tl.exp(shaped - log_sum[:, None]) - tl.where(word[None, :] == target[:, None], 1.0, 0.0)
    slope = wrong * slope * share[:, None]
    at = slope_ptr + token[:, None] * columns + column[None, :]
    tl.store(at, slope.to(slope_ptr.dtype.element_ty), mask=there[:, None] & (column < columns)[None, :])


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, soft_cap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; arguments as `linear_cross_entropy`.

    Returns:
        losses (0 where ignored) and log-sum-exp, [tokens], float32.
    """
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    targets = targets.contiguous()
    tokens, vocab = hidden.shape[0], weight.shape[0]
    tile = _tile(hidden, soft_cap)
    blocks, rows = ceil_div(vocab, tile.blocks["BLOCK_V"]), ceil_div(tokens, tile.blocks["BLOCK_T"])
    per_split = ceil_div(blocks, max(1, min(blocks, PROGRAMS_WANTED // max(1, rows))))
    splits = ceil_div(blocks, per_split)
    lse, hit = (hidden.new_empty(tokens, splits, dtype=torch.float32) for _ in range(2))
    if tokens:
        _loss_forward_kernel[(rows, splits)](
            hidden, weight, targets, lse, hit, hidden.stride(0), weight.stride(0), tokens, vocab,
            per_split * tile.blocks["BLOCK_V"], *_constants(soft_cap, scale), **_sizes(hidden, soft_cap, tile),
            enable_fp_fusion=True,
        )  # fmt: skip
    log_sum = lse.logsumexp(-1)
    return (log_sum - hit.sum(-1)).masked_fill(targets == ignore_index, 0.0), log_sum


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sum: Tensor, ignore_index: int,
    soft_cap: float | None, scale: float, columns: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight, `columns` words at a time.

    Args:
        grad: [tokens], of the losses.
        log_sum: [tokens], as `forward` gave it.
    """
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    targets = targets.contiguous()
    share = grad.float().masked_fill(targets == ignore_index, 0.0).contiguous()
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for first in range(0, weight.shape[0], columns):
        words = slice(first, min(weight.shape[0], first + columns))
        slope = _slope(hidden, weight, targets, log_sum, share, soft_cap, scale, words)
        d_hidden += slope @ weight[words]
        torch.mm(slope.t(), hidden, out=d_weight[words])
    return d_hidden.to(hidden.dtype), d_weight


def _slope(
    hidden: Tensor, weight: Tensor, targets: Tensor, log_sum: Tensor, share: Tensor, soft_cap: float | None,
    scale: float, words: slice,
) -> Tensor:  # fmt: skip
    """Launches the backward kernel: [tokens, words]."""
    tokens, columns = hidden.shape[0], words.stop - words.start
    slope = hidden.new_empty(tokens, columns)
    tile = _tile(hidden, soft_cap)
    if tokens:
        _loss_slope_kernel[(ceil_div(tokens, tile.blocks["BLOCK_T"]), ceil_div(columns, tile.blocks["BLOCK_V"]))](
            hidden, weight, targets, log_sum, share, slope, hidden.stride(0), weight.stride(0), tokens, weight.shape[0],
            words.start, columns, *_constants(soft_cap, scale), **_sizes(hidden, soft_cap, tile),
            enable_fp_fusion=True,
        )  # fmt: skip
    return slope


def _tile(hidden: Tensor, soft_cap: float | None) -> Tile:
    return LOGITS.pick(hidden.device, element=hidden.element_size(), capped=int(soft_cap is not None))


def _constants(soft_cap: float | None, scale: float) -> tuple[float, float]:
    return float(scale), float(soft_cap or 1.0)


def _sizes(hidden: Tensor, soft_cap: float | None, tile: Tile) -> dict[str, object]:
    """What the kernels are compiled for."""
    precision = "tf32x3" if hidden.dtype == torch.float32 else "tf32"
    return {"WIDTH": hidden.shape[1], "CAPPED": soft_cap is not None, "PRECISION": precision, **tile.launch()}
