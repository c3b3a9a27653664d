"""Decayed linear attention on the GPU: the launches, and their registration as operators of torch.

A call runs the running decay, the state pass, with a vector decay the scores, and the output. The backward pass runs the
state pass again instead of keeping the state of every chunk, which would be the largest tensor of a layer. States that
pass between kernels are kept in bfloat16 for bfloat16 inputs, which is what the products take, and in float32 otherwise
(float16 would overflow); running sums, accumulators, and the states that a caller sees are float32.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.guard import on_its_device
from archcompass.kernels.linear_attention import triton_chunks as chunks_forward
from archcompass.kernels.linear_attention import triton_gradients as chunks_backward
from archcompass.kernels.linear_attention.cost import Decay, linear_attention_cost
from archcompass.kernels.linear_attention.tiles import (
    CHUNK,
    OUTPUT,
    QUERY_KEY_GRADIENT,
    RUNNING,
    SCORES,
    STATE,
    STATE_GRADIENT,
    STEP,
    VALUE_GRADIENT,
)
from archcompass.kernels.tiles import next_power_of_two

KINDS: dict[int, Decay] = {1: "constant", 3: "scalar", 4: "vector"}
MODES = {"none": 0, "constant": 1, "scalar": 1, "vector": 2}


class _Call(NamedTuple):
    """What the launches of one call share."""

    kind: Decay
    shape: tuple[int, int, int, int, int, int]  # batch, time, groups, heads, K, V
    chunk: int
    chunks: int  # of each sequence; of all together when packed
    all_chunks: int
    sequences: int
    cu_seqlens: Tensor | None
    offsets: Tensor | None  # first chunk of each packed sequence
    place: Tensor | None  # sequence and number of each chunk of a pack

    @property
    def sizes(self) -> tuple[int, int]:
        """Run-time arguments of every kernel: tokens and chunks of a sequence."""
        return self.shape[1], self.chunks


def _call(q: Tensor, v: Tensor, decay: Tensor | None, cu_seqlens: Tensor | None) -> _Call:
    batch, time, groups, key_dim = q.shape
    shape = (batch, time, groups, v.shape[2], key_dim, v.shape[3])
    kind: Decay = "none" if decay is None else KINDS[decay.dim()]
    chunk = CHUNK[kind]
    if cu_seqlens is None:
        chunks = triton.cdiv(time, chunk)
        return _Call(kind, shape, chunk, chunks, batch * chunks, batch, None, None, None)
    cu_seqlens = cu_seqlens.to(q.device, torch.int32).contiguous()
    sequences = cu_seqlens.numel() - 1
    most = triton.cdiv(time, chunk) + sequences  # how many there are is known to the device only
    ends = ((cu_seqlens.diff() + chunk - 1) // chunk).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    every = torch.arange(most, device=q.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, every, right=True).clamp(max=sequences - 1)
    place = torch.stack([sequence, every - offsets[sequence]], dim=1).int()
    return _Call(kind, shape, chunk, most, most, sequences, cu_seqlens, offsets.int(), place)


def _precision(x: Tensor) -> str:
    """How float32 products are taken: in three tensor core products, unless torch is told that one will do."""
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _running_decay(decay: Tensor | None, call: _Call) -> Tensor | None:
    """Base-2 running log decay, [tokens, heads] or [tokens, heads * K]."""
    if decay is None:
        return None
    tokens = call.shape[0] * call.shape[1]
    columns = call.shape[3] * (call.shape[4] if call.kind == "vector" else 1)
    decay = decay.expand(tokens, columns) if call.kind == "constant" else decay.contiguous().view(tokens, columns)
    running = torch.empty((tokens, columns), dtype=torch.float32, device=decay.device)
    tile = RUNNING.pick(decay.device)
    chunks_forward._running_decay_kernel[(call.all_chunks, triton.cdiv(columns, tile.blocks["BLOCK"]))](
        decay, running, call.cu_seqlens, call.place, *call.sizes, columns, decay.stride(0),
        CHUNK=call.chunk, **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return running


def _states(k: Tensor, v: Tensor, running: Tensor | None, initial: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
    """The state before every chunk, and after the last of every sequence."""
    _, _, groups, heads, key_dim, value_dim = call.shape
    states = v.new_empty((call.all_chunks, heads, key_dim, value_dim), dtype=_state_dtype(v))
    final = v.new_empty((call.sequences, heads, key_dim, value_dim), dtype=torch.float32)
    tile = STATE.pick(v.device, bytes=v.element_size())
    tiles = triton.cdiv(key_dim, tile.blocks["BLOCK_K"]) * triton.cdiv(value_dim, tile.blocks["BLOCK_V"])
    chunks_forward._state_kernel[(call.sequences, heads, tiles)](
        k, v, running, initial, states, final, call.cu_seqlens, call.offsets, *call.sizes, groups, heads,
        K=key_dim, V=value_dim, MODE=MODES[call.kind], CHUNK=call.chunk, PRECISION=_precision(v),
        **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return states, final


def _scores(q: Tensor, k: Tensor, running: Tensor | None, exclusive: bool, call: _Call) -> Tensor | None:
    """With a vector decay, the scores of every chunk, [tokens, heads, C]."""
    if call.kind != "vector":
        return None
    batch, time, groups, heads, key_dim, _ = call.shape
    scores = q.new_empty((batch * time, heads, call.chunk))
    chunks_forward._scores_kernel[(call.all_chunks, heads)](
        q, k, running, scores, call.cu_seqlens, call.place, *call.sizes, groups, heads,
        K=key_dim, EXCLUSIVE=exclusive, CHUNK=call.chunk, LEVELS=call.chunk.bit_length() - 1, PRECISION=_precision(q),
        **SCORES.pick(q.device, bytes=q.element_size()).launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return scores


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None,
    exclusive: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernels on contiguous tensors.

    Returns:
        outputs like v, and the state after the last token of every sequence, float32.
    """
    call = _call(q, v, decay, cu_seqlens)
    _, _, groups, heads, key_dim, value_dim = call.shape
    if not v.numel() or not call.sequences:
        empty = v.new_zeros((call.sequences, heads, key_dim, value_dim), dtype=torch.float32)
        return torch.empty_like(v), empty if initial is None else initial.clone()
    running = _running_decay(decay, call)
    states, final = _states(k, v, running, initial, call)
    scores = _scores(q, k, running, exclusive, call)
    out = torch.empty_like(v)
    tile = OUTPUT.pick(v.device, bytes=v.element_size())
    chunks_forward._output_kernel[(call.all_chunks, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]), heads)](
        q, k, v, running, scores, states, out, call.cu_seqlens, call.place, *call.sizes, groups, heads, scale,
        K=key_dim, V=value_dim, MODE=MODES[call.kind], EXCLUSIVE=exclusive, CHUNK=call.chunk, PRECISION=_precision(v),
        **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out, final


def backward(
    dout: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None,
    cu_seqlens: Tensor | None, exclusive: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernels on contiguous tensors.

    Returns:
        gradients of q, k, v, of the decay (empty without one) and of the initial state.
    """
    call = _call(q, v, decay, cu_seqlens)
    batch, time, groups, heads, key_dim, value_dim = call.shape
    if not v.numel() or not call.sequences:
        ddecay = v.new_empty(0) if decay is None else torch.zeros_like(decay)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), ddecay, dfinal.clone()
    running = _running_decay(decay, call)
    states, _ = _states(k, v, running, initial, call)
    scores = _scores(q, k, running, exclusive, call)
    dstates, dinitial = torch.empty_like(states), torch.empty_like(dfinal)
    common = (*call.sizes, groups, heads, scale)
    flags = {
        "K": key_dim, "V": value_dim, "MODE": MODES[call.kind], "EXCLUSIVE": exclusive, "CHUNK": call.chunk,
        "PRECISION": _precision(v), "enable_fp_fusion": True,
    }  # fmt: skip
    tile = STATE_GRADIENT.pick(v.device, bytes=v.element_size())
    tiles = triton.cdiv(key_dim, tile.blocks["BLOCK_K"]) * triton.cdiv(value_dim, tile.blocks["BLOCK_V"])
    chunks_backward._state_gradient_kernel[(call.sequences, heads, tiles)](
        q, dout, running, dfinal, dstates, dinitial, call.cu_seqlens, call.offsets, *common, **flags, **tile.launch()
    )
    dv = torch.empty_like(v)
    tile = VALUE_GRADIENT.pick(v.device, bytes=v.element_size())
    chunks_backward._value_gradient_kernel[(call.all_chunks, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]), heads)](
        q, k, running, scores, dstates, dout, dv, call.cu_seqlens, call.place, *common, **flags, **tile.launch()
    )
    levels = call.chunk.bit_length() - 1 if call.kind == "vector" else 0
    tile = QUERY_KEY_GRADIENT.pick(v.device, bytes=v.element_size(), levels=levels)
    tiles = triton.cdiv(key_dim, tile.blocks["BLOCK_K"])
    dtype = q.dtype if heads == groups else torch.float32  # the heads of a group are summed below
    dq, dk = (q.new_empty((batch, time, heads, key_dim), dtype=dtype) for _ in range(2))
    shape = {1: (tiles, batch, time, heads), 2: (batch, time, heads, key_dim), 0: (0,)}[MODES[call.kind]]
    dg = q.new_empty(shape, dtype=torch.float32)
    chunks_backward._query_key_gradient_kernel[(call.all_chunks, tiles, heads)](
        q, k, v, running, states, dstates, dout, dq, dk, dg, call.cu_seqlens, call.place,
        *call.sizes, batch * time, groups, heads, scale, LEVELS=levels, **flags, **tile.launch(),
    )  # fmt: skip
    if heads != groups:
        dq, dk = (x.unflatten(2, (groups, -1)).sum(3).to(q.dtype) for x in (dq, dk))
    if decay is None:
        return dq, dk, dv, dg, dinitial
    if call.kind != "vector":
        dg = dg.sum((0, 1, 2)) if call.kind == "constant" else dg.sum(0)
    return dq, dk, dv, dg.to(decay.dtype), dinitial


@torch.library.custom_op("archcompass::linear_attention_triton", mutates_args=())
@on_its_device
def linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None,
    exclusive: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`forward` as an operator of torch."""
    return forward(
        q.contiguous(), k.contiguous(), v.contiguous(), _contiguous(decay), _contiguous(initial), cu_seqlens,
        exclusive, scale,
    )  # fmt: skip


@linear_attention_op.register_fake
def _(q, k, v, decay, initial, cu_seqlens, exclusive, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    final = v.new_empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return v.new_empty(v.shape), final


@torch.library.custom_op("archcompass::linear_attention_triton_backward", mutates_args=())
@on_its_device
def linear_attention_backward_op(
    dout: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None,
    cu_seqlens: Tensor | None, exclusive: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` as an operator of torch."""
    return backward(
        dout.contiguous(), dfinal.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), _contiguous(decay),
        _contiguous(initial), cu_seqlens, exclusive, scale,
    )  # fmt: skip


@linear_attention_backward_op.register_fake
def _(dout, dfinal, q, k, v, decay, initial, cu_seqlens, exclusive, scale):
    ddecay = v.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), ddecay, dfinal.new_empty(dfinal.shape)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _keep(ctx, inputs, output):
    *tensors, ctx.exclusive, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout, dfinal):
    decay, initial = ctx.saved_tensors[3:5]
    dq, dk, dv, ddecay, dinitial = linear_attention_backward_op(
        dout, dfinal, *ctx.saved_tensors, ctx.exclusive, ctx.scale
    )
    return dq, dk, dv, None if decay is None else ddecay, None if initial is None else dinitial, None, None, None


linear_attention_op.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.archcompass.linear_attention_triton)
def _flops(q_shape, k_shape, v_shape, decay_shape=None, *args, out_shape=None, **kwargs) -> int:
    kind: Decay = "none" if decay_shape is None else KINDS[len(decay_shape)]
    return linear_attention_cost(
        batch=q_shape[0], new_tokens=q_shape[1], key_groups=q_shape[2], heads=v_shape[2], key_dim=q_shape[3],
        value_dim=v_shape[3], decay=kind, element_bytes=1, chunk_size=CHUNK[kind],
    ).flops  # fmt: skip


@torch.library.custom_op("archcompass::linear_attention_step_triton", mutates_args=("state",))
@on_its_device
def step_op(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, state: Tensor,
    exclusive: bool, scale: float,
) -> Tensor:  # fmt: skip
    """One token per sequence; overwrites the state, which must be contiguous and float32."""
    return step(
        q.contiguous(), k.contiguous(), v.contiguous(), _contiguous(decay), _contiguous(bonus), state, exclusive, scale
    )


@step_op.register_fake
def _(q, k, v, decay, bonus, state, exclusive, scale):
    return v.new_empty(v.shape)


@register_flop_formula(torch.ops.archcompass.linear_attention_step_triton)
def _step_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return int(2 * v_shape[0] * v_shape[1] * q_shape[-1] * v_shape[-1])


def step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, state: Tensor,
    exclusive: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Launches the step kernel on contiguous tensors; returns outputs like v."""
    batch, groups, key_dim = q.shape
    heads, value_dim = v.shape[1:]
    out = torch.empty_like(v)
    if not out.numel():
        return out
    mode = 0 if decay is None else (2 if decay.dim() == 3 else 1)
    stride = heads if decay is not None and decay.dim() == 2 else 0  # a constant decay serves every sequence
    tile = STEP.pick(v.device, key_dim=key_dim)
    chunks_forward._step_kernel[(batch, heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
        q, k, v, decay, bonus, state, out, groups, heads, stride, scale,
        K=key_dim, V=value_dim, MODE=mode, EXCLUSIVE=exclusive, ALL_K=next_power_of_two(key_dim),
        **tile.launch(), enable_fp_fusion=True,
    )  # fmt: skip
    return out
