"""Every query of this package sees one stretch of keys: as two tensors, which is all the GPU kernels need to know.

Causality, windows, chunks, left padding and packed sequences all leave a query the keys [first, last); over the
queries of a row both ends only grow. So one kernel serves them all, and a block of keys is seen by one stretch of
queries.
"""

import torch
from torch import Tensor

from archcompass.kernels.attention.pieces import Visibility


def intervals(
    new: int, keys: int, see: Visibility, padding: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """first and last, int32 [rows, new], where rows is 1 or (with padding) the batch; equal where nothing is seen.

    Reads no value on the host.
    """
    query = torch.arange(keys - new, keys, device=device, dtype=torch.int32)[None, :]
    start = torch.zeros((1, 1), device=device, dtype=torch.int32)
    end = torch.full((1, 1), keys, device=device, dtype=torch.int32)
    if cu_seqlens is not None:
        edges = cu_seqlens.to(torch.int32)
        sequence = torch.searchsorted(edges, query.flatten(), right=True)
        start, end = edges[sequence - 1][None, :], edges[sequence.clamp(max=edges.shape[0] - 1)][None, :]
    elif padding is not None:
        start = padding.to(torch.int32)[:, None]
    first, last = start, (query + 1 if see.causal else end)
    if see.window is not None:
        first = torch.maximum(first, query - (see.window - 1))
    if see.chunk is not None:
        first = torch.maximum(first, query - (query - start + see.key_offset) % see.chunk)
    first, last = torch.broadcast_tensors(first, last)
    empty = (query < start) | (first >= last)
    return first.masked_fill(empty, 0).contiguous(), last.masked_fill(empty, 0).contiguous()


def queries_of_key_blocks(first: Tensor, last: Tensor, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """For each block of keys, the stretch [begin, end) of queries that see any of it: int32 [rows, blocks]."""
    rows = first.shape[0]
    edge = torch.arange(0, keys, block, device=first.device, dtype=torch.int32).expand(rows, -1).contiguous()
    begin = torch.searchsorted(last, edge, right=True, out_int32=True)
    end = torch.searchsorted(first, edge + block, out_int32=True)
    return begin, end
