"""Attention in plain torch, from pieces that need no mask of queries times keys.

What a causal query sees is cut into pieces (a block of past keys that every query of a block sees whole, a causal
square, a band of a window), each a call of torch's fused CPU attention that also returns its log-sum-exp; pieces over
the same queries are merged by it (the split of FlashDecoding; Dao et al. 2022, arXiv 2205.14135, section 3.1). Given the
merged output and log-sum-exp, torch's own backward of each piece is exact, so the gradient takes the same pieces.
Soft caps and other devices take a dense piece in plain matmuls, at most QUERY_ROWS queries at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from archcompass.kernels.attention.cost import first_visible

QUERY_ROWS = 256  # of a dense piece, whose scores exist
BAND_ROWS = 64  # of a window's band: each row more computes one hidden key more (measured: 32 to 64 are best)
SHORT_SEGMENT = 16  # up to here one small mask beats two pieces and their merge
NOTHING = float("-inf")


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [q0, q1) against keys [k0, k1).

    `rule` is "all" (every pair is visible), "causal" (a square along the diagonal) or "band" (causal and, where the
    call has one, windowed: needs a small mask).
    """

    q0: int
    q1: int
    k0: int
    k1: int
    rule: str


@dataclass(frozen=True, slots=True)
class Visibility:
    """What a query sees, and how scores are scaled: everything about a call but its tensors."""

    causal: bool
    window: int | None
    chunk: int | None
    key_offset: int
    scale: float
    soft_cap: float | None


def plan(new_tokens: int, keys: int, see: Visibility) -> Iterator[Piece]:
    """Cuts the visible pairs of one sequence into pieces; queries that see nothing are in none."""
    if new_tokens == 0 or keys == 0:
        return
    if not see.causal:
        yield Piece(0, new_tokens, 0, keys, "all")
        return
    past = keys - new_tokens
    position = max(0, past)
    while position < keys:
        end = keys if see.chunk is None else min(keys, position + see.chunk - (position + see.key_offset) % see.chunk)
        start = first_visible(position, None, see.chunk, see.key_offset)
        yield from _causal_run(position, end, start, past, see.window)
        position = end


def _causal_run(position: int, end: int, start: int, past: int, window: int | None) -> Iterator[Piece]:
    """Pieces of the queries at [position, end), whose keys begin at `start`."""
    if window is None or window >= end - start:
        if position == start:
            yield Piece(position - past, end - past, start, end, "causal")
        elif end - position == 1:
            yield Piece(position - past, end - past, start, end, "all")
        elif end - position <= SHORT_SEGMENT:
            yield Piece(position - past, end - past, start, end, "band")
        else:
            yield Piece(position - past, end - past, start, position, "all")
            yield Piece(position - past, end - past, position, end, "causal")
        return
    unlimited = min(end, start + window)
    if position < unlimited:
        yield from _causal_run(position, unlimited, start, past, None)
        position = unlimited
    for row in range(position, end, BAND_ROWS):
        stop = min(end, row + BAND_ROWS)
        rule = "all" if stop - row == 1 else "band"
        yield Piece(row - past, stop - past, row - window + 1, stop, rule)


def attend(q: Tensor, k: Tensor, v: Tensor, see: Visibility) -> tuple[Tensor, Tensor]:
    """Output [batch, new, heads, Dv] and log-sum-exp [batch, heads, new] of the pieces, merged; no sinks."""
    batch, new, heads, _ = q.shape
    pieces = list(plan(new, k.shape[1], see))
    if len(pieces) == 1 and pieces[0].q1 - pieces[0].q0 == new:
        columns = slice(pieces[0].k0, pieces[0].k1)
        return _forward(q, k[:, columns], v[:, columns], pieces[0], see, k.shape[1] - new)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(batch, new, heads, v.shape[-1])
    lse = torch.full((batch, heads, new), NOTHING, dtype=wide, device=q.device)
    done = 0
    for piece in pieces:
        rows, columns = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
        part, part_lse = _forward(q[:, rows], k[:, columns], v[:, columns], piece, see, k.shape[1] - new)
        if piece.q0 < done:
            part, part_lse = _merged(out[:, rows], lse[:, :, rows], part, part_lse)
        out[:, rows], lse[:, :, rows] = part, part_lse
        done = piece.q1
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, see: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` are those of the whole call, sinks included."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for piece in plan(q.shape[1], k.shape[1], see):
        rows, columns = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
        tensors = (grad[:, rows], q[:, rows], k[:, columns], v[:, columns], out[:, rows], lse[:, :, rows])
        part = _backward(*tensors, piece, see, k.shape[1] - q.shape[1])
        for total, index, piece_grad in zip((dq, dk, dv), (rows, columns, columns), part, strict=True):
            total[:, index] += piece_grad
    return dq, dk, dv


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Lets each head's sink [heads] join the softmax: its share of the weight is dropped from `out`."""
    joined = torch.logaddexp(lse, sinks[None, :, None].to(lse.dtype))
    kept = torch.exp(lse - joined)
    return out * kept.transpose(1, 2).unsqueeze(-1).to(out.dtype), joined


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """-sum over queries of (the sink's weight) (grad · out): the sink has no value of its own."""
    share = torch.exp(sinks[None, :, None].to(lse.dtype) - lse)
    along = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    return -(share * along).sum((0, 2)).to(sinks.dtype)


def _merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different keys as one: each output weighted by its share of the joint denominator."""
    joined = torch.logaddexp(lse, part_lse)
    share, part_share = (torch.exp(x - joined).transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse))
    return (out * share + part * part_share).to(out.dtype), joined


def _forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece, see: Visibility, past: int) -> tuple[Tensor, Tensor]:
    if not _fused(q, see):
        return _dense_forward(q, k, v, piece, see, past)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    mask = _mask(piece, see, past, q) if piece.rule == "band" else None
    folded = piece.rule != "causal" and q.shape[1] <= SHORT_SEGMENT
    if folded:
        q, mask = _fold(q, group), None if mask is None else mask.repeat(group, 1)
    else:
        q = q.transpose(1, 2)
    k, v, value_dim = *equal_width(k.transpose(1, 2), v.transpose(1, 2)), v.shape[-1]
    q = widened(q, k.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, piece.rule == "causal", attn_mask=mask, scale=see.scale
    )
    if folded:
        out, lse = _unfold(out, group), _unfold(lse, group)
    return out[..., :value_dim].transpose(1, 2), lse.view(lse.shape[0], heads, -1)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    piece: Piece,
    see: Visibility,
    past: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fused(q, see):
        return _dense_backward(grad, q, k, v, out, lse, piece, see, past)
    group, key_dim, value_dim = q.shape[2] // k.shape[2], k.shape[-1], v.shape[-1]
    mask = _mask(piece, see, past, q) if piece.rule == "band" else None
    k, v = equal_width(k.transpose(1, 2), v.transpose(1, 2))
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    width = k.shape[-1]
    q, grad, out = (widened(x.transpose(1, 2), width).contiguous() for x in (q, grad, out))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, piece.rule == "causal", attn_mask=mask, scale=see.scale
    )
    dk, dv = (torch.unflatten(x, 1, (-1, group)).sum(2) for x in (dk, dv))
    dq, dk, dv = dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim]
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _fused(q: Tensor, see: Visibility) -> bool:
    """Whether torch's fused CPU attention can compute a piece of this call."""
    return q.device.type == "cpu" and see.soft_cap is None


def _fold(q: Tensor, group: int) -> Tensor:
    """[batch, new, heads, D] to [batch, kv_heads, group new, D]: a key-value head's queries become rows of one."""
    return torch.unflatten(q, 2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(rows: Tensor, group: int) -> Tensor:
    """[batch, kv_heads, group new, ...] back to [batch, heads, new, ...]."""
    return torch.unflatten(rows, 2, (group, -1)).flatten(1, 2)


def equal_width(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Zero columns up to a common width, which the fused kernel demands; they change no score and are cut off."""
    width = max(k.shape[-1], v.shape[-1])
    return widened(k, width), widened(v, width)


def widened(x: Tensor, width: int) -> Tensor:
    """x with zero columns up to `width`; itself where it is as wide, of which torch's pad would make a copy."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _visible(piece: Piece, see: Visibility, past: int, device: torch.device) -> Tensor | None:
    if piece.rule == "all":
        return None
    query = torch.arange(piece.q0 + past, piece.q1 + past, device=device)[:, None]
    key = torch.arange(piece.k0, piece.k1, device=device)
    visible = key <= query
    return visible if see.window is None else visible & (key > query - see.window)


def _mask(piece: Piece, see: Visibility, past: int, q: Tensor) -> Tensor:
    visible = _visible(piece, see, past, q.device)
    assert visible is not None  # only bands ask
    return torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, NOTHING)


def _row_blocks(piece: Piece) -> Iterator[Piece]:
    """The piece in blocks of QUERY_ROWS queries, so that scores stay small; a causal square becomes bands."""
    for q0 in range(piece.q0, piece.q1, QUERY_ROWS):
        q1 = min(piece.q1, q0 + QUERY_ROWS)
        if piece.rule == "causal":
            yield Piece(q0, q1, piece.k0, piece.k0 + q1 - piece.q0, "band")
        else:
            yield Piece(q0, q1, piece.k0, piece.k1, piece.rule)


def _scores(q: Tensor, k: Tensor, block: Piece, see: Visibility, past: int) -> Tensor:
    """Scaled, capped and masked scores [batch, kv_heads, group, new, keys], at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = torch.unflatten(q, 2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    scores = (q @ k.permute(0, 2, 3, 1).unsqueeze(2)).to(wide) * see.scale
    if see.soft_cap is not None:
        scores = see.soft_cap * torch.tanh(scores / see.soft_cap)
    visible = _visible(block, see, past, q.device)
    return scores if visible is None else scores.masked_fill(~visible, NOTHING)


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece, see: Visibility, past: int) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for block in _row_blocks(piece):
        rows, columns = slice(block.q0 - piece.q0, block.q1 - piece.q0), slice(0, block.k1 - block.k0)
        scores = _scores(q[:, rows], k[:, columns], block, see, past)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - lse).to(v.dtype)
        outs.append((weights @ v[:, columns].transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2))
        sums.append(lse.squeeze(-1).flatten(1, 2))
    return torch.cat(outs, dim=1), torch.cat(sums, dim=2)


def _dense_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    piece: Piece,
    see: Visibility,
    past: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dv = Pᵀ dO, dS = P (dO vᵀ - dO·O), through the cap, then dq = dS k and dk = dSᵀ q; P is computed again."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    kv_heads = k.shape[2]
    split = (kv_heads, q.shape[2] // kv_heads)
    for block in _row_blocks(piece):
        rows, columns = slice(block.q0 - piece.q0, block.q1 - piece.q0), slice(0, block.k1 - block.k0)
        scores = _scores(q[:, rows], k[:, columns], block, see, past)
        weights = torch.exp(scores - torch.unflatten(lse[:, :, rows], 1, split).unsqueeze(-1))
        g, o, rows_q = (torch.unflatten(x[:, rows], 2, split).permute(0, 2, 3, 1, 4) for x in (grad, out, q))
        along = (g.to(weights.dtype) * o.to(weights.dtype)).sum(-1, keepdim=True)
        d_scores = weights * ((g @ v[:, columns].permute(0, 2, 3, 1).unsqueeze(2)).to(weights.dtype) - along)
        if see.soft_cap is not None:
            d_scores = d_scores * (1 - (scores.masked_fill(scores == NOTHING, 0.0) / see.soft_cap) ** 2)
        d_scores = (d_scores * see.scale).to(q.dtype)
        dq[:, rows] += (d_scores @ k[:, columns].transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2)
        dk[:, columns] += (d_scores.transpose(-1, -2) @ rows_q).sum(2).transpose(1, 2)
        dv[:, columns] += (weights.to(g.dtype).transpose(-1, -2) @ g).sum(2).transpose(1, 2)
    return dq, dk, dv
