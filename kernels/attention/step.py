"""Attention of a single step on a processor: one query a head, over keys that it sees all.

A step's heads are query rows of their key-value head, which reads each key once and not once per head. Torch's fused
kernel makes small products of them. Measured on Zen 5 cores, with a cache that lies in memory: from WORTH_PRODUCTS elements
on, MKL's batched product of the keys, then that of the values, takes 0.75 to 0.9 of its time in float32 for up to four
rows, and 1.1 times for eight. In bfloat16 the fused kernel is best, but takes 2.2 to 2.6 times as long for a single row as
for two; the float32 products of a copy of a small cache take 0.5 to 0.9 of the time for two.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from archcompass.kernels.attention.pieces import equal_width, widened

WORTH_PRODUCTS = 1 << 16  # elements of the keys
MOST_ROWS = 4  # query heads of a key-value head
WIDENED_ELEMENTS = 1 << 20  # of keys that are copied to float32 for a step; beyond, copies leave the caches


def one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, soft_cap: float | None) -> Tensor:
    """Shapes as `attention`, with one query and no gradient: [batch, 1, heads, Dv]."""
    batch, _, heads, width = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    rows = q.reshape(batch, k.shape[1], -1, width)
    if soft_cap is not None or _products_win(rows, k):
        out = _by_products(rows, k, v, scale, sinks, soft_cap)
    else:
        out = _fused(rows, k, v, scale, sinks)
    return out.reshape(batch, 1, heads, -1)


def _products_win(rows: Tensor, k: Tensor) -> bool:
    if k.element_size() < 4:
        return rows.shape[2] == 1 and k.numel() <= WIDENED_ELEMENTS
    return rows.shape[2] <= MOST_ROWS and k.numel() >= WORTH_PRODUCTS


def _by_products(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, soft_cap: float | None
) -> Tensor:
    """In float32 or wider; a sink is one key more, without a value."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    query, key, value = (x.flatten(0, 1).to(dtype=wide) for x in (rows, k, v))
    scores = torch.bmm(key, (query * scale).mT).mT
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if sinks is not None:
        sink = sinks.to(dtype=wide).expand(rows.shape[0], -1).reshape(*query.shape[:2], 1)
        scores = torch.cat((scores, sink), dim=-1)
    return torch.bmm(scores.softmax(-1)[..., : k.shape[2]], value).type_as(rows)


def _fused(rows: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Torch's fused kernel; of its output a sink leaves the share that is not its own."""
    group, value_dim = rows.shape[2], v.shape[-1]
    if k.shape[-1] != value_dim:
        k, v = equal_width(k, v)
        rows = widened(rows, k.shape[-1])
    if group == 1 and rows.element_size() < 4:
        rows = torch.cat((rows, rows), dim=2)
    if sinks is None:
        out = scaled_dot_product_attention(rows, k, v, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k, v, scale=scale)
        out = out * torch.sigmoid(lse - sinks.view(k.shape[1], group)).unsqueeze(-1).type_as(out)
    return out if out.shape[2:] == (group, value_dim) else out[:, :, :group, :value_dim]
