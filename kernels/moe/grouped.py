"""Experts in plain torch: rows sorted by expert, one matrix product per expert in use, rows summed back per token.

One operator, so that autograd, torch.compile and counters see it whole; how many rows an expert gets is read on the
host inside. The backward keeps only the inputs and computes the inner activations again. On the CPU the rows are
gathered by index_select and combined by embedding_bag, which adds in float32 and beats indexing and index_add by two
to ten times there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, linear
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.moe.activations import Activation
from archcompass.kernels.moe.cost import moe_cost


def moe_grouped(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    scale_input: bool,
) -> Tensor:
    """Shapes as `moe_mlp`."""
    settings = (activation.name, activation.gated, activation.alpha, activation.limit, activation.up_offset)
    tensors = (x, weights.to(x.dtype), experts, gate_up, down, gate_up_bias, down_bias)
    result: Tensor = _moe(*tensors, *settings, scale_input)
    return result


def grouped_mm_obstacle(x: Tensor, down: Tensor) -> str | None:
    """Why torch's grouped_mm cannot take such experts, or None: it wants bfloat16 and rows of whole 16 bytes."""
    if x.dtype != torch.bfloat16:
        return f"torch's grouped_mm takes bfloat16, and x is {x.dtype}"
    if x.shape[1] % 8 or down.shape[2] % 8:
        return f"torch's grouped_mm needs widths that are multiples of 8, not {x.shape[1]} and {down.shape[2]}"
    return None


def moe_grouped_mm(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    scale_input: bool,
) -> Tensor:
    """The same by torch's grouped_mm, which reads nothing on the host: for GPUs. Shapes as `moe_mlp`."""
    flat = experts.flatten()
    chosen, order = flat.sort(stable=True)
    edges = torch.arange(1, gate_up.shape[0] + 1, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(chosen, edges, out_int32=True)
    scale = weights.to(x.dtype).flatten()[order, None]
    rows = x.index_select(0, order // experts.shape[1])
    rows = rows * scale if scale_input else rows
    inner = grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
    inner = activation(inner if gate_up_bias is None else inner + gate_up_bias[chosen])
    out = grouped_mm(inner, down.transpose(1, 2), offs=ends)
    out = out if down_bias is None else out + down_bias[chosen]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (out if scale_input else out * scale).index_select(0, place).view(*experts.shape, -1).sum(1)


def moe_dense_equivalent(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """Products of the same FLOPs and shapes that ask for no values: every chosen row through expert 0. For meta."""
    tokens, top_k = weights.shape
    rows = x.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    out = linear(activation(linear(rows, gate_up[0])), down[0]).view(tokens, top_k, -1)
    return (out * weights.to(x.dtype).unsqueeze(-1)).sum(1)


@torch.library.custom_op("archcompass::moe_grouped", mutates_args=())
def _moe(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
    scale_input: bool,
) -> Tensor:
    act = Activation(activation, gated, alpha, limit, up_offset)
    if x.shape[0] == 1:
        return _single_token(x, weights, experts, gate_up, down, gate_up_bias, down_bias, act, scale_input)
    order, runs = _by_expert(experts, gate_up.shape[0])
    rows = x.index_select(0, order // experts.shape[1])
    if scale_input:
        rows *= weights.flatten()[order, None]
    out = rows.new_empty(rows.shape[0], down.shape[1])
    for expert, span in runs:
        inner = act(linear(rows[span], gate_up[expert], _row(gate_up_bias, expert)))
        _product(inner, down[expert].t(), _row(down_bias, expert), out=out[span])
    return _combine(out, order, experts.shape, None if scale_input else weights)


@_moe.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("archcompass::moe_grouped_backward", mutates_args=())
def _moe_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
    scale_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    act = Activation(activation, gated, alpha, limit, up_offset)
    order, runs = _by_expert(experts, gate_up.shape[0])
    token = order // experts.shape[1]
    rows, grads, scales = x.index_select(0, token), grad.index_select(0, token), weights.flatten()[order, None]
    d_rows, d_scales = torch.empty_like(rows), torch.empty_like(scales)
    d_gate_up, d_down, d_gate_up_bias, d_down_bias = (
        x.new_empty(0) if p is None else torch.zeros_like(p) for p in (gate_up, down, gate_up_bias, down_bias)
    )
    for expert, span in runs:
        row, scale, g = rows[span], scales[span], grads[span]
        fed = row * scale if scale_input else row
        before = linear(fed, gate_up[expert], _row(gate_up_bias, expert))
        inner = act(before)
        g_out = g if scale_input else g * scale
        if not scale_input:
            d_scales[span] = (linear(inner, down[expert], _row(down_bias, expert)) * g).sum(-1, keepdim=True)
        torch.mm(g_out.t(), inner, out=d_down[expert])
        d_before = act.backward(g_out @ down[expert], before)
        torch.mm(d_before.t(), fed, out=d_gate_up[expert])
        torch.mm(d_before, gate_up[expert], out=d_rows[span])
        if scale_input:
            d_scales[span] = (d_rows[span] * row).sum(-1, keepdim=True)
            d_rows[span] *= scale
        if gate_up_bias is not None:
            d_gate_up_bias[expert] = d_before.sum(0)
        if down_bias is not None:
            d_down_bias[expert] = g_out.sum(0)
    d_weights = torch.empty_like(weights).view(-1).index_copy_(0, order, d_scales.squeeze(-1)).view_as(weights)
    return _combine(d_rows, order, experts.shape, None), d_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias


@_moe_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    given = (x, weights, *rest[:4])
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, *parameters = _moe_backward(grad, *ctx.saved_tensors, *ctx.settings)
    given = (p if saved is not None else None for p, saved in zip(parameters, ctx.saved_tensors[3:], strict=True))
    return dx, dw, None, *given, *[None] * len(ctx.settings)


_moe.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.archcompass.moe_grouped)
def _flops(
    x: Any,
    weights: Any,
    experts: Any,
    gate_up: Any,
    down: Any,
    gate_up_bias: Any,
    down_bias: Any,
    activation: str,
    gated: bool,
    *_: Any,
    **__: Any,
) -> int:
    return moe_cost(
        tokens=x[0],
        hidden=x[1],
        intermediate=down[2],
        experts=down[0],
        top_k=experts[1],
        gated=gated,
        element_bytes=1,
    ).flops


def _single_token(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: Activation,
    scale_input: bool,
) -> Tensor:
    """A decode step: one view of each chosen expert, no sorting, no copy of weights."""
    parts = []
    for weight, expert in zip(weights[0], experts[0].tolist(), strict=True):
        fed = x * weight if scale_input else x
        inner = act(linear(fed, gate_up[expert], _row(gate_up_bias, expert)))
        parts.append(linear(inner, down[expert], _row(down_bias, expert)))
    rows = torch.cat(parts)
    return rows.sum(0, keepdim=True) if scale_input else weights @ rows


def _by_expert(experts: Tensor, count: int) -> tuple[Tensor, Iterator[tuple[int, slice]]]:
    """The order that sorts all (token, choice) pairs by expert, and each busy expert's stretch of it."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    return order, _runs(torch.bincount(flat, minlength=count).tolist())


def _runs(counts: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _combine(rows: Tensor, order: Tensor, shape: torch.Size, weights: Tensor | None) -> Tensor:
    """[tokens k, width] rows in `order` to their tokens' (weighted) sums [tokens, width]."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    if rows.device.type == "cpu":
        return embedding_bag(place.view(shape), rows, per_sample_weights=weights, mode="sum")
    picked = rows.index_select(0, place).view(*shape, -1)
    return picked.sum(1) if weights is None else torch.bmm(weights.unsqueeze(1), picked).squeeze(1)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
