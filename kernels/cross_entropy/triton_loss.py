"""Loss and gradient of a chunk of logits on the GPU, in place: two passes over each row, and no other memory.

The first pass keeps a running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867), the second overwrites
the logits by their gradient (Liger Kernel, arXiv 2410.10989). Memory-bound: a row is read twice and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.tiles import Row, Table, Tile, next_power_of_two

TILES = Table(
    "cross_entropy",
    (
        Row(Tile({"BLOCK": 1024}, warps=4), upto={"vocab": 4096}),
        Row(Tile({"BLOCK": 4096}, warps=8), upto={"vocab": 65536}),
        Row(Tile({"BLOCK": 8192}, warps=16)),
    ),
)


@triton.jit
def _shaped(logits, scale, soft_cap, CAPPED: tl.constexpr):
    """Scaled and capped logits, and the derivative by the raw ones."""
    shaped = logits * scale
    slope = scale
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * shaped / soft_cap) - 1.0
        shaped = soft_cap * bent
        slope = scale * (1.0 - bent * bent)
    return shaped, slope


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, share_ptr, losses_ptr, row_stride, ignore_index, scale, soft_cap,
    VOCAB: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    known = target != ignore_index
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    hit = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + column
        raw = tl.load(logits_ptr + at, mask=at < VOCAB, other=0.0).to(tl.float32)
        shaped, _slope = _shaped(raw, scale, soft_cap, CAPPED)
        hit += tl.where(at == target, shaped, 0.0)
        shaped = tl.where(at < VOCAB, shaped, float("-inf"))
        higher = tl.maximum(top, shaped)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - anchor) + tl.exp(shaped - anchor)
        top = higher
    peak = tl.max(top, axis=0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
    tl.store(losses_ptr + row, tl.where(known, log_sum - tl.sum(hit, axis=0), 0.0))
    if share_ptr is not None:
        share = tl.where(known, tl.load(share_ptr + row).to(tl.float32), 0.0)
        for start in range(0, VOCAB, BLOCK):
            at = start + column
            raw = tl.load(logits_ptr + at, mask=at < VOCAB, other=0.0).to(tl.float32)
            shaped, slope = _shaped(raw, scale, soft_cap, CAPPED)
            wrong = tl.exp(shaped - log_sum) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits_ptr + at, (wrong * slope * share).to(logits_ptr.dtype.element_ty), mask=at < VOCAB)


def loss_and_slope(
    logits: Tensor, targets: Tensor, share: Tensor | None, ignore_index: int, soft_cap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launches the kernel on contiguous logits [tokens, vocab], which it overwrites where `share` [tokens] is given.

    Returns:
        losses [tokens], float32, and the logits: now Σ share loss differentiated by them.
    """
    tokens, vocab = logits.shape
    losses = logits.new_empty(tokens, dtype=torch.float32)
    tile = TILES.pick(logits.device, vocab=vocab)
    block = min(tile.blocks["BLOCK"], next_power_of_two(vocab))
    if tokens:
        _cross_entropy_kernel[(tokens,)](
            logits, targets, share, losses, logits.stride(0), ignore_index, float(scale), float(soft_cap or 1.0),
            VOCAB=vocab, CAPPED=soft_cap is not None, **{**tile.launch(), "BLOCK": block}, enable_fp_fusion=True,
        )  # fmt: skip
    return losses, logits
