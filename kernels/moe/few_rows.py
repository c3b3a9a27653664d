"""Experts with a few rows each, in bfloat16 on a CPU: those that lie side by side go to oneDNN as one batch of products.

oneDNN takes ten to twenty microseconds to start, and turns every matrix over before it multiplies, in the same time for
one row as for a few. So each expert of a batch is given as many rows as its busiest one has.
"""

from array import array
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

FEW, MOST = 3, 8  # rows of an expert, on average and of the busiest; beyond, filling up costs what the starts save


@dataclass(frozen=True, slots=True)
class Batches:
    """Rows by expert, filled up: pair and token of each row, the row of each pair, experts and rows of each batch."""

    order: Tensor
    token: Tensor
    place: Tensor
    spans: list[tuple[slice, slice]]

    def multiply(self, rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        """Each row times the [K, N] matrix of its expert, plus its expert's bias."""
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        for experts, span in self.spans:
            count = experts.stop - experts.start
            products = out[span].view(count, -1, out.shape[1])
            torch.bmm(rows[span].view(count, -1, rows.shape[1]), matrices[experts], out=products)
            if bias is not None:
                products += bias[experts, None]
        return out


def in_batches(experts: Tensor, count: int) -> Batches | None:
    """The pairs of [tokens, k] chosen experts of `count`, or None where they are not busy with a few rows each.

    With less than half a row on average busy experts hardly ever lie side by side.
    """
    if not count <= 2 * experts.numel() <= 2 * FEW * count:
        return None
    waiting = defaultdict[int, list[int]](list)
    for pair, expert in enumerate(experts.flatten().tolist()):
        waiting[expert].append(pair)
    if max(map(len, waiting.values())) > MOST:
        return None
    order, place, spans = list[int](), [0] * experts.numel(), list[tuple[slice, slice]]()
    for run in _side_by_side(sorted(waiting)):
        start, most = len(order), max(len(waiting[expert]) for expert in run)
        for pairs in map(waiting.__getitem__, run):
            for row, pair in enumerate(pairs, len(order)):
                place[pair] = row
            order += pairs + pairs[:1] * (most - len(pairs))
        spans.append((slice(run[0], run[-1] + 1), slice(start, len(order))))
    numbers = torch.frombuffer(array("q", order + place), dtype=torch.int64)  # sooner made than by torch.tensor
    filled, rows = numbers.split((len(order), len(place)))
    return Batches(filled, filled // experts.shape[1], rows, spans)


def _side_by_side(experts: list[int]) -> list[list[int]]:
    runs = list[list[int]]()
    for expert in experts:
        if runs and runs[-1][-1] == expert - 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return runs
