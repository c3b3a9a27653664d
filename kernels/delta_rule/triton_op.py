"""The delta rule and DPLR on the GPU, put together from their kernels.

For inference everything is fused (`triton_prepare.py`) around the state pass (`triton_passes.py`). For training the terms
of the state pass are made by `chunked.py`, batched over all chunks, so that autograd knows their gradients; the inverse
and the state pass, forward and backward, are kernels there too.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.delta_rule import triton_prepare as prepare
from archcompass.kernels.delta_rule.chunked import ChunkTerms, dplr_terms, scalar_terms, vector_terms
from archcompass.kernels.delta_rule.cost import Decay, delta_rule_cost, dplr_cost
from archcompass.kernels.delta_rule.triton_passes import invert, state_pass, state_pass_op, unit_lower_inverse_op
from archcompass.kernels.delta_rule.triton_prepare import Chunks
from archcompass.kernels.delta_rule.triton_step import delta_rule_step_op, dplr_step_op

Spans = list[tuple[int, int]]


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
    scale: float, chunk: int, spans: Spans | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `delta_rule`, with every default filled in; `spans` are those of packed sequences, None for a batch."""
    chunks = chunk_table(v, chunk, spans)
    q, k = q.to(v.dtype), k.to(v.dtype)
    inputs = [q, k, v, beta, log_decay]
    if not _wants_gradients([*inputs, state]):
        if v.shape[1] == 1:
            now = [None if x is None else x[:, 0] for x in inputs]
            last = state.clone(memory_format=torch.contiguous_format)
            return delta_rule_step_op(*now, last, scale).unsqueeze(1), last
        flat = [None if x is None else x.flatten(0, 1) for x in inputs]
        out, last = delta_rule_op(*flat, state, *chunks[1:], scale, chunk)
        return out.view(v.shape), last
    like = v
    q, k, v, beta, *gate = (_to_chunks(x, chunks, spans) for x in inputs if x is not None)
    make = vector_terms if log_decay is not None and log_decay.dim() == 4 else scalar_terms
    terms = make(q, k, v, beta, *gate, scale=scale, precise=state.dtype, invert=unit_lower_inverse_op)
    return _trained(terms, state, chunks, spans, like)


def dplr_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor,
    scale: float, chunk: int, spans: Spans | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `dplr`, with every default filled in; `spans` are those of packed sequences, None for a batch."""
    chunks = chunk_table(v, chunk, spans)
    q, k, a, b = (x.to(v.dtype) for x in (q, k, a, b))
    inputs = [q, k, v, a, b, log_decay]
    if not _wants_gradients([*inputs, state]):
        if v.shape[1] == 1:
            last = state.clone(memory_format=torch.contiguous_format)
            return dplr_step_op(*(x[:, 0] for x in inputs), last, scale).unsqueeze(1), last
        out, last = dplr_op(*(x.flatten(0, 1) for x in inputs), state, *chunks[1:], scale, chunk)
        return out.view(v.shape), last
    terms = dplr_terms(
        *(_to_chunks(x, chunks, spans) for x in inputs), scale=scale, precise=state.dtype, invert=unit_lower_inverse_op
    )
    return _trained(terms, state, chunks, spans, v)


def chunk_table(v: Tensor, chunk: int, spans: Spans | None) -> Chunks:
    """Where the chunks lie among the tokens of a batch, or of packed sequences."""
    batch, time = v.shape[:2]
    if spans is None:
        per_sequence = ceil_div(time, chunk)
        start = torch.arange(per_sequence, device=v.device) * chunk
        return Chunks(
            size=chunk,
            first=(torch.arange(batch, device=v.device)[:, None] * time + start).flatten(),
            length=(time - start).clamp(max=chunk).to(torch.int32).repeat(batch),
            bounds=torch.arange(batch + 1, device=v.device, dtype=torch.int32) * per_sequence,
        )
    starts = [range(start, end, chunk) for start, end in spans]
    lengths = [min(chunk, end - at) for start, (_, end) in zip(starts, spans, strict=True) for at in start]
    return Chunks(
        size=chunk,
        first=torch.tensor([at for start in starts for at in start], dtype=torch.int64, device=v.device),
        length=torch.tensor(lengths, dtype=torch.int32, device=v.device),
        bounds=torch.tensor([0, *accumulate(map(len, starts))], dtype=torch.int32, device=v.device),
    )


def _wants_gradients(tensors: list[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _to_chunks(x: Tensor, chunks: Chunks, spans: Spans | None) -> Tensor:
    """[batch, time, heads, ...] as [chunks, 1, heads, C, ...], zeros past each chunk's length."""
    if spans is None:
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunks.size))
        tiles = torch.unflatten(x, 1, (-1, chunks.size)).flatten(0, 1)
    else:
        token = chunks.first[:, None] + torch.arange(chunks.size, device=x.device)
        real = _real(chunks)
        tiles = x[0][token.masked_fill(~real, 0)]
        tiles = tiles * real.view(*real.shape, *(1,) * (tiles.dim() - 2)).to(x.dtype)
    return tiles.transpose(1, 2).unsqueeze(1)


def _from_chunks(out: Tensor, chunks: Chunks, spans: Spans | None, like: Tensor) -> Tensor:
    """[chunks, heads, C, V] as [batch, time, heads, V]."""
    out = out.transpose(1, 2)
    if spans is None:
        return torch.unflatten(out, 0, (like.shape[0], -1)).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)
    return out[_real(chunks)].unsqueeze(0).to(like.dtype)


def _real(chunks: Chunks) -> Tensor:
    """Which places of the chunks hold a token, [chunks, C]."""
    return torch.arange(chunks.size, device=chunks.length.device) < chunks.length[:, None]


def _trained(
    terms: ChunkTerms, state: Tensor, chunks: Chunks, spans: Spans | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The state pass and the outputs, with gradients."""
    predict, read = terms.rows.chunk(2, dim=-2)
    w, u = terms.inverse @ -predict, terms.inverse @ terms.target
    decay = None if terms.decay is None else terms.decay.squeeze(-1)
    states, written, last = state_pass_op(w, u, terms.tail, decay, terms.values, state, chunks.bounds)
    out = read @ states + terms.mix @ written
    if terms.out is not None:
        out = out + terms.out
    return _from_chunks(out, chunks, spans, like), last


@torch.library.custom_op("archcompass::delta_rule_triton", mutates_args=())
def delta_rule_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
    first: Tensor, length: Tensor, bounds: Tensor, scale: float, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Inference over tokens [tokens, heads, ...] as the table says; outputs like v, and the last states."""
    chunks = Chunks(chunk, first, length, bounds)
    q, k, v = (x.contiguous() for x in (q, k, v))
    beta, state = beta.contiguous(), state.contiguous()
    running = None if log_decay is None else prepare.running_decay(log_decay.contiguous(), chunks)
    if log_decay is not None and running is not None and log_decay.dim() == 3:
        score = partial(prepare.vector_scores, running=running, chunks=chunks, before=False)
        strict = score(k, k, beta, scale=1.0, strict=True, dtype=torch.float32)
        mix = score(q, k, None, scale=scale, strict=False, dtype=v.dtype)
    else:
        strict, mix = prepare.scores(q, k, beta, running, scale, chunks)
    inverse = _inverse(strict)
    w, u, tail = prepare.writes(inverse, k, k, None, v, beta, running, None, chunks)
    states, written, last = state_pass(w, u, tail, _whole(running), None, state, bounds)
    return prepare.output(q, states, mix, written, running, None, v, scale, chunks), last


@delta_rule_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Any, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("archcompass::dplr_triton", mutates_args=())
def dplr_op(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor,
    first: Tensor, length: Tensor, bounds: Tensor, scale: float, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Inference over tokens [tokens, heads, ...] as the table says; outputs like v, and the last states."""
    chunks = Chunks(chunk, first, length, bounds)
    q, k, v, a, b, log_decay, state = (x.contiguous() for x in (q, k, v, a, b, log_decay, state))
    running = prepare.running_decay(log_decay, chunks)
    score = partial(prepare.vector_scores, weight=None, running=running, chunks=chunks)
    strict = score(a, b, scale=-1.0, before=True, strict=True, dtype=torch.float32)
    a_k = score(a, k, scale=1.0, before=True, strict=True, dtype=v.dtype)
    q_b = score(q, b, scale=scale, before=False, strict=False, dtype=v.dtype)
    q_k = score(q, k, scale=scale, before=False, strict=False, dtype=v.dtype)
    w, u, tail = prepare.writes(_inverse(strict), a, b, k, v, None, running, a_k, chunks)
    values = prepare.gather(v, chunks)
    states, written, last = state_pass(w, u, tail, _whole(running), values, state, bounds)
    return prepare.output(q, states, q_b, written, running, q_k, v, scale, chunks), last


@dplr_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, a: Any, b: Any, log_decay: Any, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _inverse(strict: Tensor) -> Tensor:
    return invert(strict.flatten(0, 1)).view(strict.shape)


def _whole(running: Tensor | None) -> Tensor | None:
    """Decay over each chunk, [chunks, heads, 1 or K]."""
    return None if running is None else running[:, :, -1].exp()


@register_flop_formula(torch.ops.archcompass.delta_rule_triton)
def _delta_flops(
    q: Any, k: Any, v: Any, beta: Any, log_decay: Any, state: Any, first: Any, *args: Any, **_: Any
) -> int:
    """The cost of `cost.py`, chunk by chunk."""
    decay: Decay = "none" if log_decay is None else "scalar" if len(log_decay) == 2 else "vector"
    return delta_rule_cost(
        batch=first[0], new_tokens=args[3], chunk_size=args[3], key_heads=q[1], heads=v[1], key_dim=q[2],
        value_dim=v[2], decay=decay, element_bytes=2,
    ).flops  # fmt: skip


@register_flop_formula(torch.ops.archcompass.dplr_triton)
def _dplr_flops(q: Any, k: Any, v: Any, a: Any, b: Any, g: Any, state: Any, first: Any, *args: Any, **_: Any) -> int:
    """The cost of `cost.py`, chunk by chunk."""
    return dplr_cost(
        batch=first[0], new_tokens=args[3], chunk_size=args[3], heads=v[1], key_dim=q[2], value_dim=v[2],
        element_bytes=2,
    ).flops  # fmt: skip
