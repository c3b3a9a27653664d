"""Decayed linear attention whose decay per head stays moderate inside a chunk, or that has none: the fastest form.

Around the middle m of a chunk's decay (`kernels/decay.py`) the decay leaves the scores, and is one factor of the values
on their way in and one of the outputs on their way out; all heads of a group share the bare scores A, in one product:

    V' = e^(m - b) V        O = e^(b - m) (A V' + Q S')        S' = e^m S        S <- e^(b_C - m) (S' + K^T V')

The exact form takes an exponential for every pair of tokens and a product for every head; this one neither. Where a few
heads decay too strongly, the exact form is run for these and replaces what was made here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archcompass.kernels.decay import centred
from archcompass.kernels.linear import products

# Elements of the values of all chunks that are worked on at once: what a core's cache holds beside the state.
CACHED_ELEMENTS = 3 << 16


def centred_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, exclusive: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the form over whole chunks.

    Args:
        q: [batch, chunks, C, groups, K]; k: likewise; v: [batch, chunks, C, heads, V].
        decay: log decay in the dtype of the state, [batch or 1, chunks, C, heads], or None.
        state: [batch, heads, K, V].

    Returns:
        outputs like v, and the state after the last chunk.
    """
    groups, value_dim = q.shape[3], v.shape[4]
    factors = None if decay is None else centred(decay, exclusive)
    q, k = q.transpose(2, 3), k.transpose(2, 3)  # [batch, chunks, groups, C, K]
    now = state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)  # [batch, groups, K, heads of the group * V]
    passing = None
    if factors is not None:  # [batch, chunks + 1, groups, 1, heads of the group * V]
        passing = factors.passing.repeat_interleave(value_dim, dim=-1).unflatten(-1, (groups, -1)).unsqueeze(-2)
        now = now * passing[:, 0]
    at_once = _chunks_at_once(v)
    result = v.new_empty(v.shape) if at_once < v.shape[1] else None
    for first in range(0, v.shape[1], at_once):
        here = slice(first, first + at_once)
        values = v[:, here] if factors is None else v[:, here] * factors.going_in[:, here].to(v.dtype)[..., None]
        after = None if passing is None else passing[:, first + 1 : first + at_once + 1]
        out, now = _some_chunks(q[:, here], k[:, here], _by_group(values, groups), after, exclusive, now)
        out = out.unflatten(-1, (-1, value_dim)).transpose(2, 3).flatten(3, 4)
        place = None if result is None else result[:, here]
        weight = 1.0 if factors is None else factors.coming_out[:, here].to(v.dtype)[..., None]
        out = torch.mul(out, weight, out=place)
    return out if result is None else result, now.unflatten(3, (-1, value_dim)).transpose(2, 3).flatten(
        1, 2
    ).contiguous()


def _some_chunks(
    q: Tensor, k: Tensor, v: Tensor, passing: Tensor | None, exclusive: bool, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs without their factor, [batch, chunks, groups, C, columns], and the state as it enters the next chunk."""
    scores = (q @ k.mT).tril(-1 if exclusive else 0)
    written = products(k.mT, v).to(entering.dtype)
    in_place = not torch.is_grad_enabled()
    read = []
    for n in range(v.shape[1]):
        read.append(products(q[:, n], entering.to(q.dtype)))
        entering = written[:, n].add_(entering) if in_place else written[:, n] + entering
        if passing is not None:
            entering.mul_(passing[:, n])
    return products(scores, v).add_(torch.stack(read, dim=1)), entering


def _by_group(v: Tensor, groups: int) -> Tensor:
    """[batch, chunks, C, heads, V] as one matrix per group, [batch, chunks, groups, C, heads of the group * V]."""
    by_head: Tensor = v.unflatten(3, (groups, -1))
    return by_head.flatten(4).transpose(2, 3)


def _chunks_at_once(v: Tensor) -> int:
    """On a CPU as many chunks as stay in its cache; all, where a graph is recorded."""
    if v.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return int(v.shape[1])
    return max(1, CACHED_ELEMENTS * v.shape[1] // v.numel())
