"""One token of the delta rule or of DPLR on the GPU: the state is read once and written once, in place.

A program holds one head's K x (tile of V) of the state in registers; every sum over K is a sum over its own rows. Decoding
is bound by the bytes of the state, so nothing else is worth saving.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archcompass.kernels.delta_rule.tiles import STEP
from archcompass.kernels.guard import on_its_device
from archcompass.kernels.tiles import next_power_of_two


@triton.jit
def _delta_step_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, state_ptr, out_ptr, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k, v = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = sequence * heads + head
    key_at = (sequence * (heads // group) + head // group) * K + k
    places = state_ptr + at * K * V + k[:, None] * V + v[None, :]
    mask = (k < K)[:, None] & (v < V)[None, :]
    state = tl.load(places, mask=mask, other=0.0)
    if g_ptr is not None:
        if VECTOR:
            state *= tl.exp(tl.load(g_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32))[:, None]
        else:
            state *= tl.exp(tl.load(g_ptr + at).to(tl.float32))
    key = tl.load(k_ptr + key_at, mask=k < K, other=0.0).to(tl.float32)[:, None]
    query = tl.load(q_ptr + key_at, mask=k < K, other=0.0).to(tl.float32)[:, None]
    value = tl.load(v_ptr + at * V + v, mask=v < V, other=0.0).to(tl.float32)
    written = tl.load(beta_ptr + at).to(tl.float32) * (value - tl.sum(state * key, axis=0))
    state += key * written[None, :]
    tl.store(places, state, mask=mask)
    out = scale * tl.sum(state * query, axis=0)
    tl.store(out_ptr + at * V + v, out.to(out_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _dplr_step_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, g_ptr, state_ptr, out_ptr, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    k, v = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    places = state_ptr + at * K * V + k[:, None] * V + v[None, :]
    mask = (k < K)[:, None] & (v < V)[None, :]
    state = tl.load(places, mask=mask, other=0.0)
    removal = tl.load(a_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    low_rank = tl.sum(state * removal, axis=0)
    state *= tl.exp(tl.load(g_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32))[:, None]
    state += tl.load(b_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32)[:, None] * low_rank[None, :]
    value = tl.load(v_ptr + at * V + v, mask=v < V, other=0.0).to(tl.float32)
    state += tl.load(k_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32)[:, None] * value[None, :]
    tl.store(places, state, mask=mask)
    query = tl.load(q_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    out = scale * tl.sum(state * query, axis=0)
    tl.store(out_ptr + at * V + v, out.to(out_ptr.dtype.element_ty), mask=v < V)


@torch.library.custom_op("archcompass::delta_rule_step_triton", mutates_args={"state"})
@on_its_device
def delta_rule_step_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """Launches a step: shapes as in `delta_rule_step`; the float32 state is overwritten. No gradients."""
    batch, heads, value_dim = v.shape
    key_dim = q.shape[2]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    tile = STEP.pick(v.device, key_dim=key_dim)
    gate = None if log_decay is None else log_decay.contiguous()
    if out.numel():
        _delta_step_kernel[(batch, heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
            q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous(), gate, state, out,
            heads, heads // q.shape[1], scale,
            K=key_dim, V=value_dim, VECTOR=gate is not None and gate.dim() == 3, BLOCK_K=next_power_of_two(key_dim),
            **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return out


@delta_rule_step_op.register_fake
def _(q, k, v, beta, log_decay, state, scale):
    return v.new_empty(v.shape)


@torch.library.custom_op("archcompass::dplr_step_triton", mutates_args={"state"})
@on_its_device
def dplr_step_op(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Launches a step: shapes as in `dplr_step`; the float32 state is overwritten. No gradients."""
    batch, heads, value_dim = v.shape
    key_dim = q.shape[2]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    tile = STEP.pick(v.device, key_dim=key_dim)
    if out.numel():
        _dplr_step_kernel[(batch, heads, triton.cdiv(value_dim, tile.blocks["BLOCK_V"]))](
            *(x.contiguous() for x in (q, k, v, a, b, log_decay)), state, out, heads, scale,
            K=key_dim, V=value_dim, BLOCK_K=next_power_of_two(key_dim), **tile.launch(), enable_fp_fusion=True,
        )  # fmt: skip
    return out


@dplr_step_op.register_fake
def _(q, k, v, a, b, log_decay, state, scale):
    return v.new_empty(v.shape)
