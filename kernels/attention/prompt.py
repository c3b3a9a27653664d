"""A whole prompt on a processor: a causal square as float32 products, some queries of one key-value head at a time.

torch's fused kernel multiplies tiles too small for a processor's caches. Queries against all keys that the last of them
sees, a softmax in place and one more product take 0.4 to 0.7 of its time (measured with one and two threads, 512 to 16,384
tokens), and round nothing in between.
"""

from itertools import product

import torch
from torch import Tensor

from archcompass.kernels.attention.memory import LONGEST, SHORTEST, queries_at_once
from archcompass.kernels.eager import plain_call
from archcompass.kernels.linear import linear, products

MOST_THREADS = 8  # these products share their rows among threads, the fused kernel its heads, of which there are more

_HAS_ONEDNN, _HAS_TILES = torch.backends.mkldnn.is_available(), torch.cpu._is_amx_tile_supported()


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `prompt_attention` is the faster way; not for half types where the processor has matrix tiles (AMX)."""
    faster = _HAS_ONEDNN and torch.get_num_threads() <= MOST_THREADS
    typed = q.dtype is torch.float32 or (q.dtype.itemsize == 2 and not _HAS_TILES)
    return faster and typed and q.is_cpu and SHORTEST <= q.shape[1] <= LONGEST and plain_call(q, k, v)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v, where a query sees the keys up to its own.

    Args:
        q: [batch, time, heads, D]; k, v: [batch, time, kv_heads, D] and [batch, time, kv_heads, Dv].

    Returns:
        [batch, time, heads, Dv] in the dtype of q.
    """
    batch, time, kv_heads, _ = k.shape
    group = q.shape[2] // kv_heads
    rows = queries_at_once(time, group)
    hidden = torch.full((rows, rows), float("-inf")).triu_(1).unsqueeze(1)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for n, head in product(range(batch), range(kv_heads)):
        mine = slice(head * group, (head + 1) * group)
        keys, values = (x[n, :, head].float().contiguous() for x in (k, v))
        for start in range(0, time, rows):
            here = slice(start, start + rows)
            out[n, here, mine] = _some_queries(q[n, here, mine].float() * scale, keys, values, start, hidden)
    return out


def _some_queries(q: Tensor, keys: Tensor, values: Tensor, start: int, hidden: Tensor) -> Tensor:
    """Queries [new, group, D] at positions from `start` on."""
    new, end = q.shape[0], start + q.shape[0]
    scores = linear(q.flatten(0, 1), keys[:end]).view(new, -1, end)
    scores[..., start:] += hidden[:new, :, :new]
    weights = torch.softmax(scores, -1, out=scores)
    return products(weights.flatten(0, 1), values[:end]).view(new, -1, values.shape[-1])
