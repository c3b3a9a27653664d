"""What a log decay does inside a chunk of C tokens: shared by decayed linear attention and the delta rule.

With b the running sum of the log decay inside the chunk, everything there needs e^(b_i - b_j) for i >= j, and e^(-b_j)
alone overflows. Three forms, none of which can:

- `decay_matrix`, the differences themselves, C x C for every head: right for any decay.
- `centred`, two factors e^(b_i - m) e^(m - b_j) around half the chunk's decay, m = b_C / 2: one factor goes in with the
  values and one comes out with the outputs, so that nothing C x C is per head. Right while |b_C| <= WIDEST_SPAN.
- `vector_decayed_scores`, for a decay per key dimension: a lower triangular matrix is a diagonal and, for m = 1, 2, 4, ...
  C/2, the m x m blocks where the later half of a block of 2m rows meets its earlier half. Inside one block, anchored at
  the last row of the earlier half, both exponents, b_i - anchor and anchor - b_j, are never positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold
from torch.utils.checkpoint import checkpoint

# A CPU raises two to a power four times as fast as e (torch 2.13, AVX-512): so does everything here.
LOG2_E = 1.4426950408889634
# exp(x) below these is nothing beside the terms that remain, and as a denormal number it would slow a CPU down.
SMALLEST_EXPONENT = {torch.float64: -700.0, torch.float32: -80.0}
# One token that forgets this much forgets all; a stronger decay would only cost the running sum its precision.
STRONGEST_DECAY = {torch.float64: -800.0, torch.float32: -110.0}
# e^(WIDEST_SPAN / 2) = 1e26 leaves float32 and bfloat16 room for sums of values of 1e12.
WIDEST_SPAN = 120.0


def running_sum(log_decay: Tensor, dim: int) -> Tensor:
    """Running sum of the log decay, each token held to the strongest that means anything."""
    return log_decay.clamp(min=STRONGEST_DECAY[log_decay.dtype]).cumsum(dim)


def decayed(log_factor: Tensor) -> Tensor:
    """exp of a log decay, exactly zero where it is too small to matter."""
    smallest = LOG2_E * SMALLEST_EXPONENT[log_factor.dtype]
    return threshold(log_factor * LOG2_E, smallest, -torch.inf).exp2()


def decay_matrix(read: Tensor, running: Tensor) -> Tensor:
    """exp(read_i - b_j) for i >= j: [..., C] twice to [..., C, C]. Above the diagonal it says 1 and means nothing.

    Exponents are held between the smallest that matters and 0, so nothing overflows and nothing is a denormal number.
    """
    apart = (read * LOG2_E).unsqueeze(-1) - (running * LOG2_E).unsqueeze(-2)
    return apart.clamp(LOG2_E * SMALLEST_EXPONENT[apart.dtype], 0.0).exp2()


class Centred(NamedTuple):
    """What a moderate decay weighs.

    `going_in` = e^(m - b) weighs what a token writes and `coming_out` = e^(b - m) what it reads, [batch, chunks, C, heads].
    `passing` weighs the state, [batch, chunks + 1, heads]: by e^m where it enters a chunk and by e^(b_C - m) where it
    leaves one, in one factor between two chunks.
    """

    going_in: Tensor
    coming_out: Tensor
    passing: Tensor


def centred(log_decay: Tensor, exclusive: bool = False) -> Centred:
    """The factors of a decay per head, [batch, chunks, C, heads]; with `exclusive` a token reads before it fades."""
    log_decay = log_decay.clamp(min=STRONGEST_DECAY[log_decay.dtype])
    running = log_decay.cumsum(2)
    read, total = running - log_decay if exclusive else running, running[:, :, -1]
    middle = total.detach() / 2  # the result is the same around any middle, so this one has no gradient
    passing = pad(middle, (0, 0, 0, 1)) + pad(total - middle, (0, 0, 1, 0))
    around = middle.unsqueeze(2)
    return Centred((around - running).exp(), (read - around).exp(), decayed(passing))


def strong_heads(log_decay: Tensor) -> Tensor | None:
    """The heads of [batch, chunks, C, heads] that `centred` cannot serve; None where values are not to be looked at."""
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    spans = log_decay.detach().sum(2, dtype=torch.float64)
    return (spans < -WIDEST_SPAN).flatten(0, 1).any(0).nonzero().flatten()


def moderated(log_decay: Tensor, strong: Tensor) -> Tensor:
    """The decay with that of strong heads held back: what they give is to be replaced."""
    if not strong.numel():
        return log_decay
    held = torch.zeros(log_decay.shape[-1], dtype=torch.bool).index_fill(0, strong, True)
    return torch.where(held, log_decay.clamp(min=-WIDEST_SPAN / log_decay.shape[2]), log_decay)


def made_again(exact: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the exact form gives strong heads, of which nothing is kept for a backward pass: that one makes it again.

    It would keep eight times as much of a head as the centred form, and weights decide how many heads are strong: the memory
    of a training step shall not hang on them.
    """
    return checkpoint(exact, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else exact()


def vector_decayed_scores(rows: Tensor, row_decay: Tensor, columns: Tensor, column_decay: Tensor) -> Tensor:
    """Every kind of row against every kind of column, under a decay per key dimension.

    Args:
        rows: [..., C, P, K], P kinds of rows (queries, keys).
        row_decay: [..., C, P or 1, K], running log decay a row has seen.
        columns: [..., C, Q, K], Q kinds of columns.
        column_decay: [..., C, 1, K], running log decay when a column was written.

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
        corner = late.to(rows.dtype).flatten(-3, -2) @ early.to(rows.dtype).flatten(-3, -2).mT
        scores = assemble(*pairs(scores), corner)
        half *= 2
    return scores.reshape(*rows.shape[:-3], size, kinds, size, other)


def pairs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring blocks, [..., 2n, rows, columns], as (earlier, later)."""
    earlier, later = torch.unflatten(blocks, -3, (-1, 2)).unbind(-3)
    return earlier, later


def assemble(earlier: Tensor, later: Tensor, corner: Tensor) -> Tensor:
    """[[earlier, 0], [corner, later]]."""
    return torch.cat([pad(earlier, (0, corner.shape[-1])), torch.cat([corner, later], dim=-1)], dim=-2)


def _halved(x: Tensor, half: int) -> Tensor:
    """[..., C, P, K] as [..., C / 2m, 2, m, P, K]."""
    return torch.unflatten(x, -3, (-1, 2, half))
