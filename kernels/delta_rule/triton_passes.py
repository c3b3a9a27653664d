"""The two parts of the delta rule that no batched product can do, on the GPU: the triangular inverse and the state pass.

The inverse runs over 16 x 16 blocks: diagonal blocks by forward substitution, a program each (in one kernel over a whole
chunk it spills registers on every GPU up to Hopper), then neighbours merge, [[A, 0], [X, D]]⁻¹ with corner -D⁻¹ X A⁻¹.

The state pass is sequential over chunks and parallel over sequences, heads and tiles of V:

    Z = U + W S,    S' = Diag(decay) S + tailᵀ [Z; values]                          W = T rows, U = T target

and backward, with G the gradient of S' and dZ that of Z from the outputs:

    dZ += tail G,    G <- Diag(decay) G + Wᵀ dZ + dS

All other gradients follow from what these two write down (triton_gradients.py). States and accumulators are float32; the states
kept for the outputs are in the inputs' dtype, as the products that read them want them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.delta_rule.tiles import STATE, STATE_BACKWARD
from archcompass.kernels.tiles import next_power_of_two

BLOCK = 16


def precision(dtype: torch.dtype) -> str:
    """How float32 products run on tensor cores: as good as float32 for float32 inputs, else as good as needed."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def _invert_blocks_kernel(matrix_ptr, inverse_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """(I + L)⁻¹ of one diagonal block, by forward substitution; and zeros above it."""
    first = tl.program_id(1) * BLOCK
    base = tl.program_id(0).to(tl.int64) * C * C + first * C
    i = tl.arange(0, BLOCK)
    at = base + i[:, None] * C + first + i[None, :]
    strict = tl.load(matrix_ptr + at)
    strict = tl.where(i[:, None] > i[None, :], strict, 0.0)
    inverse = -strict
    for row in range(1, BLOCK):
        here = tl.sum(tl.where(i[:, None] == row, strict, 0.0), axis=0)
        solved = -here - tl.sum(here[:, None] * inverse, axis=0)
        inverse = tl.where(i[:, None] == row, solved[None, :], inverse)
    inverse += tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    tl.store(inverse_ptr + at, inverse)
    for column in range(first + BLOCK, C, BLOCK):
        tl.store(inverse_ptr + base + i[:, None] * C + column + i[None, :], tl.zeros((BLOCK, BLOCK), tl.float32))


@triton.jit
def _merge_blocks_kernel(matrix_ptr, inverse_ptr, C: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """The corner that joins two neighbouring inverted blocks of HALF rows."""
    first = tl.program_id(1) * 2 * HALF
    base = tl.program_id(0).to(tl.int64) * C * C
    i = tl.arange(0, HALF)
    earlier = tl.load(inverse_ptr + base + (first + i)[:, None] * C + first + i[None, :])
    later = tl.load(inverse_ptr + base + (first + HALF + i)[:, None] * C + first + HALF + i[None, :])
    corner = base + (first + HALF + i)[:, None] * C + first + i[None, :]
    joined = tl.dot(tl.load(matrix_ptr + corner), earlier, input_precision=PRECISION)
    tl.store(inverse_ptr + corner, -tl.dot(later, joined, input_precision=PRECISION))


@triton.jit
def _state_kernel(
    w_ptr, u_ptr, tail_ptr, decay_ptr, values_ptr, first_ptr, bounds_ptr,
    states_ptr, written_ptr, last_ptr,
    heads,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    k, v, i = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, C)
    in_kv = (k < K)[:, None] & (v < V)[None, :]
    in_iv = (i < C)[:, None] & (v < V)[None, :]
    in_ik = (i < C)[:, None] & (k < K)[None, :]
    at_kv, at_iv, at_ik = k[:, None] * V + v[None, :], i[:, None] * V + v[None, :], i[:, None] * K + k[None, :]
    outer = (sequence.to(tl.int64) * heads + head) * K * V
    state = tl.load(first_ptr + outer + at_kv, mask=in_kv, other=0.0).to(tl.float32)
    for n in range(tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)):
        chunk = tl.cast(n, tl.int64) * heads + head
        tl.store(states_ptr + chunk * K * V + at_kv, state.to(states_ptr.dtype.element_ty), mask=in_kv)
        w = tl.load(w_ptr + chunk * C * K + at_ik, mask=in_ik, other=0.0)
        written = tl.load(u_ptr + chunk * C * V + at_iv, mask=in_iv, other=0.0).to(tl.float32)
        written += tl.dot(w, state.to(w.dtype), input_precision=PRECISION)
        tl.store(written_ptr + chunk * C * V + at_iv, written.to(written_ptr.dtype.element_ty), mask=in_iv)
        if decay_ptr is not None:
            if VECTOR:
                state *= tl.load(decay_ptr + chunk * K + k, mask=k < K, other=0.0)[:, None]
            else:
                state *= tl.load(decay_ptr + chunk)
        tail = tl.load(tail_ptr + chunk * TAIL * K + at_ik, mask=in_ik, other=0.0)
        state += tl.dot(tl.trans(tail), written.to(tail.dtype), input_precision=PRECISION)
        if values_ptr is not None:
            tail = tl.load(tail_ptr + chunk * TAIL * K + C * K + at_ik, mask=in_ik, other=0.0)
            values = tl.load(values_ptr + chunk * C * V + at_iv, mask=in_iv, other=0.0)
            state += tl.dot(tl.trans(tail), values, input_precision=PRECISION)
    tl.store(last_ptr + outer + at_kv, state, mask=in_kv)


@triton.jit
def _state_backward_kernel(
    w_ptr, tail_ptr, decay_ptr, dwritten_ptr, dstates_ptr, dlast_ptr, bounds_ptr,
    after_ptr, du_ptr, dvalues_ptr, dfirst_ptr,
    heads,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`after` is the gradient of the state after each chunk; du that of U, which is that of Z."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    k, v, i = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, C)
    in_kv = (k < K)[:, None] & (v < V)[None, :]
    in_iv = (i < C)[:, None] & (v < V)[None, :]
    in_ik = (i < C)[:, None] & (k < K)[None, :]
    at_kv, at_iv, at_ik = k[:, None] * V + v[None, :], i[:, None] * V + v[None, :], i[:, None] * K + k[None, :]
    outer = (sequence.to(tl.int64) * heads + head) * K * V
    gradient = tl.load(dlast_ptr + outer + at_kv, mask=in_kv, other=0.0).to(tl.float32)
    first, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    for back in range(end - first):
        chunk = tl.cast(end - 1 - back, tl.int64) * heads + head
        tl.store(after_ptr + chunk * K * V + at_kv, gradient.to(after_ptr.dtype.element_ty), mask=in_kv)
        tail = tl.load(tail_ptr + chunk * TAIL * K + at_ik, mask=in_ik, other=0.0)
        rounded = gradient.to(tail.dtype)
        du = tl.load(dwritten_ptr + chunk * C * V + at_iv, mask=in_iv, other=0.0).to(tl.float32)
        du += tl.dot(tail, rounded, input_precision=PRECISION)
        tl.store(du_ptr + chunk * C * V + at_iv, du.to(du_ptr.dtype.element_ty), mask=in_iv)
        if dvalues_ptr is not None:
            tail = tl.load(tail_ptr + chunk * TAIL * K + C * K + at_ik, mask=in_ik, other=0.0)
            dvalues = tl.dot(tail, rounded, input_precision=PRECISION)
            tl.store(dvalues_ptr + chunk * C * V + at_iv, dvalues.to(dvalues_ptr.dtype.element_ty), mask=in_iv)
        if decay_ptr is not None:
            if VECTOR:
                gradient *= tl.load(decay_ptr + chunk * K + k, mask=k < K, other=0.0)[:, None]
            else:
                gradient *= tl.load(decay_ptr + chunk)
        w = tl.load(w_ptr + chunk * C * K + at_ik, mask=in_ik, other=0.0)
        gradient += tl.dot(tl.trans(w), du.to(w.dtype), input_precision=PRECISION)
        gradient += tl.load(dstates_ptr + chunk * K * V + at_kv, mask=in_kv, other=0.0).to(tl.float32)
    tl.store(dfirst_ptr + outer + at_kv, gradient, mask=in_kv)


def invert(strict: Tensor) -> Tensor:
    """Launches the inverse: (I + L)⁻¹ of [matrices, C, C] in float32; on and above the diagonal L is ignored."""
    matrices, size, _ = strict.shape
    inverse = torch.empty_like(strict)
    if not matrices:
        return inverse
    options = {"num_stages": 1, "enable_fp_fusion": True}
    # Matrices go first in the grid: its other dimensions end at 65535, and a long prompt has more.
    _invert_blocks_kernel[(matrices, size // BLOCK)](strict, inverse, C=size, BLOCK=BLOCK, num_warps=1, **options)
    half = BLOCK
    while half < size:
        _merge_blocks_kernel[(matrices, size // (2 * half))](
            strict, inverse, C=size, HALF=half, PRECISION="tf32x3", num_warps=1 if half == BLOCK else 4, **options
        )
        half *= 2
    return inverse


def state_pass(
    w: Tensor, u: Tensor, tail: Tensor, decay: Tensor | None, values: Tensor | None, first: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the state pass.

    Args:
        w: [chunks, heads, C, K]; u: [chunks, heads, C, V].
        tail: [chunks, heads, C, K], or with `values` [chunks, heads, 2C, K].
        decay: over each chunk, float32, [chunks, heads, 1] or [chunks, heads, K], or None.
        values: [chunks, heads, C, V], or None.
        first: states before the first chunk, [sequences, heads, K, V], float32.
        bounds: chunks of each sequence, [sequences + 1], int32.

    Returns:
        the state at each chunk's start [chunks, heads, K, V], Z [chunks, heads, C, V], and the last states.
    """
    chunks, heads, size, key_dim = w.shape
    value_dim = u.shape[-1]
    states = w.new_empty((chunks, heads, key_dim, value_dim))
    written, last = torch.empty_like(u), torch.empty_like(first)
    tile = STATE.pick(w.device, key_dim=key_dim, element_bytes=w.element_size())
    if last.numel():
        _state_kernel[(first.shape[0], heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
            w, u, tail, decay, values, first, bounds, states, written, last, heads,
            C=size, K=key_dim, V=value_dim, VECTOR=_is_vector(decay, key_dim), TAIL=tail.shape[2],
            BLOCK_K=next_power_of_two(key_dim), PRECISION=precision(w.dtype), **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return states, written, last


def state_pass_backward(
    w: Tensor, tail: Tensor, decay: Tensor | None, with_values: bool,
    dwritten: Tensor, dstates: Tensor, dlast: Tensor, bounds: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the reverse pass.

    Returns:
        the gradients of the state after each chunk [chunks, heads, K, V], of U, of the values (empty without), and of
        the first states.
    """
    chunks, heads, size, key_dim = w.shape
    value_dim = dlast.shape[-1]
    after, du = w.new_empty((chunks, heads, key_dim, value_dim)), torch.empty_like(dwritten)
    dvalues = torch.empty_like(dwritten) if with_values else dwritten.new_empty(0)
    dfirst = torch.empty_like(dlast)
    tile = STATE_BACKWARD.pick(w.device, key_dim=key_dim, element_bytes=w.element_size())
    if dlast.numel():
        _state_backward_kernel[(dlast.shape[0], heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
            w, tail, decay, dwritten, dstates, dlast, bounds, after, du, dvalues if with_values else None, dfirst, heads,
            C=size, K=key_dim, V=value_dim, VECTOR=_is_vector(decay, key_dim), TAIL=tail.shape[2],
            BLOCK_K=next_power_of_two(key_dim), PRECISION=precision(w.dtype), **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return after, du, dvalues, dfirst


def _is_vector(decay: Tensor | None, key_dim: int) -> bool:
    return decay is not None and decay.shape[-1] == key_dim and key_dim > 1
