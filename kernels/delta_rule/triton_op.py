"""The delta rule and DPLR on the GPU, put together from their kernels, as operators of torch.

Forward: `triton_prepare.py` around the state pass of `triton_passes.py`. Backward keeps the inputs and the scores, runs the
state pass again instead of keeping the state of every chunk, then the reverse pass and `triton_gradients.py`.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.cost import ceil_div
from archcompass.kernels.delta_rule import triton_gradients as gradients
from archcompass.kernels.delta_rule import triton_prepare as prepare
from archcompass.kernels.delta_rule.cost import Decay, delta_rule_cost, dplr_cost
from archcompass.kernels.delta_rule.tiles import WIDEST_FLOAT32_CHUNK
from archcompass.kernels.delta_rule.triton_gradients import Scores
from archcompass.kernels.delta_rule.triton_passes import invert, state_pass, state_pass_backward
from archcompass.kernels.delta_rule.triton_prepare import Chunks
from archcompass.kernels.delta_rule.triton_step import delta_rule_step_op, dplr_step_op
from archcompass.kernels.guard import on_its_device

Spans = list[tuple[int, int]]


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
    scale: float, chunk: int, spans: Spans | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `delta_rule`, with every default filled in; `spans` are those of packed sequences, None for a batch."""
    inputs = [q.to(v.dtype), k.to(v.dtype), v, beta, log_decay]
    if v.shape[1] == 1 and not _wants_gradients([*inputs, state]):
        now = [None if x is None else x[:, 0] for x in inputs]
        last = state.clone(memory_format=torch.contiguous_format)
        return delta_rule_step_op(*now, last, scale).unsqueeze(1), last
    flat = [None if x is None else x.flatten(0, 1) for x in inputs]
    chunks = chunk_table(v, chunk, spans)
    out, last, *_ = delta_rule_op(*flat, state, *chunks[1:], scale, chunks.size)
    return out.view(v.shape), last


def dplr_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor,
    scale: float, chunk: int, spans: Spans | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `dplr`, with every default filled in; `spans` are those of packed sequences, None for a batch."""
    q, k, a, b = (x.to(v.dtype) for x in (q, k, a, b))
    inputs = [q, k, v, a, b, log_decay]
    if v.shape[1] == 1 and not _wants_gradients([*inputs, state]):
        last = state.clone(memory_format=torch.contiguous_format)
        return dplr_step_op(*(x[:, 0] for x in inputs), last, scale).unsqueeze(1), last
    chunks = chunk_table(v, chunk, spans)
    out, last, *_ = dplr_op(*(x.flatten(0, 1) for x in inputs), state, *chunks[1:], scale, chunks.size)
    return out.view(v.shape), last


def chunk_table(v: Tensor, chunk: int, spans: Spans | None) -> Chunks:
    """Where the chunks lie among the tokens of a batch, or of packed sequences."""
    batch, time = v.shape[:2]
    if v.dtype == torch.float32:
        chunk = min(chunk, WIDEST_FLOAT32_CHUNK)
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


@torch.library.custom_op("archcompass::delta_rule_triton", mutates_args=())
@on_its_device
def delta_rule_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
    first: Tensor, length: Tensor, bounds: Tensor, scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Over tokens [tokens, heads, ...] as the table says: outputs like v, the last states, and `Scores`."""
    chunks = Chunks(chunk, first, length, bounds)
    q, k, v, beta, state = (x.contiguous() for x in (q, k, v, beta, state))
    running = _running(log_decay, chunks)
    if log_decay is not None and running is not None and log_decay.dim() == 3:
        score = partial(prepare.vector_scores, running=running, chunks=chunks, before=False)
        strict = score(k, k, beta, scale=1.0, strict=True, dtype=torch.float32)
        mix = score(q, k, None, scale=scale, strict=False, dtype=v.dtype)
    else:
        strict, mix = prepare.scores(q, k, beta, running, scale, chunks)
    inverse = _inverse(strict, v.dtype)
    w, u, tail = prepare.writes(inverse, k, k, None, v, beta, running, None, chunks)
    states, written, last = state_pass(w, u, tail, _whole(running), None, state, bounds)
    return prepare.output(q, states, mix, written, running, None, v, scale, chunks), last, inverse, mix


@delta_rule_op.register_fake
def _(q, k, v, beta, log_decay, state, first, length, bounds, scale, chunk):
    squares = (v.new_empty((first.shape[0], v.shape[1], chunk, chunk)) for _ in range(2))
    return v.new_empty(v.shape), state.new_empty(state.shape), *squares


@torch.library.custom_op("archcompass::delta_rule_triton_backward", mutates_args=())
@on_its_device
def delta_rule_backward_op(
    dout: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
    first: Tensor, length: Tensor, bounds: Tensor, inverse: Tensor, mix: Tensor, scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, the decay (empty without one) and the first states."""
    chunks, scores = Chunks(chunk, first, length, bounds), Scores(inverse, mix)
    dout, dlast, q, k, v, beta, state = (x.contiguous() for x in (dout, dlast, q, k, v, beta, state))
    log_decay = None if log_decay is None else log_decay.contiguous()
    running = _running(log_decay, chunks)
    w, u, tail = prepare.writes(inverse, k, k, None, v, beta, running, None, chunks)
    states, written, _ = state_pass(w, u, tail, _whole(running), None, state, bounds)
    dwritten, dstates = gradients.of_output(dout, q, mix, running, scale, chunks)
    after, dwritten, _, dfirst = state_pass_backward(
        w, tail, _whole(running), False, dwritten, dstates, dlast, bounds
    )  # fmt: skip
    per_head = running if log_decay is not None and log_decay.dim() == 2 else None
    dtarget, dv, dbeta = gradients.of_target(scores, dwritten, None, dout, v, beta, chunks)
    dscores = gradients.of_pairs(dtarget, dout, written, None, per_head, scale, chunks)
    rows = gradients.of_rows(
        q, None, k, None, v, beta, log_decay, running, states, after, dtarget, written, dout, dscores, scale, chunks
    )
    ddecay = q.new_empty(0) if log_decay is None else rows.decay.to(log_decay.dtype)
    return rows.q, rows.b, dv, (dbeta + rows.beta).to(beta.dtype), ddecay, dfirst


@delta_rule_backward_op.register_fake
def _(dout, dlast, q, k, v, beta, log_decay, state, *_):
    ddecay = q.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v, beta)), ddecay, state.new_empty(state.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, ctx.chunk = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, dout, dlast, *_):
    saved = ctx.saved_tensors
    dq, dk, dv, dbeta, ddecay, dfirst = delta_rule_backward_op(dout, dlast, *saved, ctx.scale, ctx.chunk)
    return dq, dk, dv, dbeta, None if saved[4] is None else ddecay, dfirst, *[None] * 5


delta_rule_op.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("archcompass::dplr_triton", mutates_args=())
@on_its_device
def dplr_op(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor,
    first: Tensor, length: Tensor, bounds: Tensor, scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Over tokens [tokens, heads, ...] as the table says: outputs like v, the last states, and `Scores`."""
    chunks = Chunks(chunk, first, length, bounds)
    q, k, v, a, b, state = (x.contiguous() for x in (q, k, v, a, b, state))
    running = prepare.running_decay(log_decay.contiguous(), chunks)
    score = partial(prepare.vector_scores, weight=None, running=running, chunks=chunks)
    strict = score(a, b, scale=-1.0, before=True, strict=True, dtype=torch.float32)
    a_k = score(a, k, scale=1.0, before=True, strict=True, dtype=v.dtype)
    q_b = score(q, b, scale=scale, before=False, strict=False, dtype=v.dtype)
    q_k = score(q, k, scale=scale, before=False, strict=False, dtype=v.dtype)
    inverse = _inverse(strict, v.dtype)
    w, u, tail = prepare.writes(inverse, a, b, k, v, None, running, a_k, chunks)
    states, written, last = state_pass(w, u, tail, _whole(running), prepare.gather(v, chunks), state, bounds)
    return prepare.output(q, states, q_b, written, running, q_k, v, scale, chunks), last, inverse, q_b, a_k, q_k


@dplr_op.register_fake
def _(q, k, v, a, b, log_decay, state, first, length, bounds, scale, chunk):
    squares = (v.new_empty((first.shape[0], v.shape[1], chunk, chunk)) for _ in range(4))
    return v.new_empty(v.shape), state.new_empty(state.shape), *squares


@torch.library.custom_op("archcompass::dplr_triton_backward", mutates_args=())
@on_its_device
def dplr_backward_op(
    dout: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor,
    first: Tensor, length: Tensor, bounds: Tensor, inverse: Tensor, q_b: Tensor, a_k: Tensor, q_k: Tensor,
    scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, a, b, the decay and the first states."""
    chunks, scores = Chunks(chunk, first, length, bounds), Scores(inverse, q_b, a_k, q_k)
    dout, dlast, q, k, v, a, b, state = (x.contiguous() for x in (dout, dlast, q, k, v, a, b, state))
    log_decay = log_decay.contiguous()
    running = prepare.running_decay(log_decay, chunks)
    w, u, tail = prepare.writes(inverse, a, b, k, v, None, running, a_k, chunks)
    states, written, _ = state_pass(w, u, tail, _whole(running), prepare.gather(v, chunks), state, bounds)
    dwritten, dstates = gradients.of_output(dout, q, q_b, running, scale, chunks)
    after, dwritten, dvalues, dfirst = state_pass_backward(
        w, tail, _whole(running), True, dwritten, dstates, dlast, bounds
    )
    dtarget, dv, _ = gradients.of_target(scores, dwritten, dvalues, dout, v, None, chunks)
    dscores = gradients.of_pairs(dtarget, dout, written, v, None, scale, chunks)
    rows = gradients.of_rows(
        q, a, b, k, v, None, log_decay, running, states, after, dtarget, written, dout, dscores, scale, chunks
    )
    return rows.q, rows.k, dv, rows.a, rows.b, rows.decay.to(log_decay.dtype), dfirst


@dplr_backward_op.register_fake
def _(dout, dlast, q, k, v, a, b, log_decay, state, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay, state))


def _differentiate_dplr(ctx, dout, dlast, *_):
    return *dplr_backward_op(dout, dlast, *ctx.saved_tensors, ctx.scale, ctx.chunk), *[None] * 5


dplr_op.register_autograd(_differentiate_dplr, setup_context=_keep)


def _running(log_decay: Tensor | None, chunks: Chunks) -> Tensor | None:
    return None if log_decay is None else prepare.running_decay(log_decay.contiguous(), chunks)


def _inverse(strict: Tensor, dtype: torch.dtype) -> Tensor:
    return invert(strict.flatten(0, 1)).view(strict.shape).to(dtype)


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


@register_flop_formula(torch.ops.archcompass.delta_rule_triton_backward)
def _delta_backward_flops(
    dout: Any, dlast: Any, q: Any, k: Any, v: Any, beta: Any, log_decay: Any, *args: Any, **_: Any
) -> int:
    vector = log_decay is not None and len(log_decay) == 3
    return _backward_flops(
        chunks=args[1][0], heads=v[1], size=args[-1], key_dim=q[2], value_dim=v[2], kinds=2, vector=vector
    )


@register_flop_formula(torch.ops.archcompass.dplr_triton_backward)
def _dplr_backward_flops(
    dout: Any, dlast: Any, q: Any, k: Any, v: Any, a: Any, b: Any, g: Any, *args: Any, **_: Any
) -> int:
    return _backward_flops(
        chunks=args[1][0], heads=v[1], size=args[-1], key_dim=q[2], value_dim=v[2], kinds=4, vector=True
    )


def _backward_flops(
    *, chunks: int, heads: int, size: int, key_dim: int, value_dim: int, kinds: int, vector: bool
) -> int:
    """Products of the kernels, each whole: W and U and the state pass once more, then the gradients.

    Through the state: two in each pass and one of the outputs, and one for every kind of row (3, or 4 of DPLR, which
    also carries the values). Of C x C by V: U, dZ, dY and each kind of score; of DPLR A_ak V, and two for dV. Of C x C by
    K: W, and two for each kind of score, at every halving under a vector decay.
    """
    low_rank = kinds == 4
    through_state = (2 + low_rank) + 1 + (2 + low_rank) + (3 + low_rank)
    by_values, by_keys = 3 + kinds + 3 * low_rank, 1 + 2 * kinds * (size.bit_length() - 1 if vector else 1)
    squares = size * (by_values * value_dim + by_keys * key_dim)
    return int(2 * chunks * heads * size * (through_state * key_dim * value_dim + squares))
