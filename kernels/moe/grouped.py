"""Experts in plain torch: rows sorted by expert, a grouped product, rows summed back per token.

One operator, so that autograd, torch.compile and counters see it whole; how many rows an expert gets is read on the
host inside. Kept for the backward pass is what the activation was applied to, and nothing else. On the CPU the rows
are gathered by index_select and combined by embedding_bag, which adds in float32 and beats indexing and index_add by
two to ten times there; the products are torch's grouped_mm where it can, else one product per busy expert, as in
float32, where `kernels/linear.py` has twice the speed, and where the rows of all experts together leave the caches. A few
bfloat16 rows for each expert are `few_rows.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from archcompass.kernels.eager import plain_call
from archcompass.kernels.linear import (
    BY_COLUMNS,
    WORTH_A_CALL,
    bags,
    linear,
    product,
    repeated,
    sum_of_rows,
    summed_rows,
)
from archcompass.kernels.moe.activations import Activation, Experts, experts_of
from archcompass.kernels.moe.cost import moe_cost
from archcompass.kernels.moe.few_rows import Batches, in_batches
from archcompass.kernels.moe.memory import one_by_one

GROUPED_MM: Any = getattr(functional, "grouped_mm", None)  # public since torch 2.10
CACHED_ELEMENTS = 1 << 17  # of a float32 tensor that a core still has in its cache for the next pass


def moe_grouped(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """Shapes as `moe_mlp`."""
    tensors = (x, weights.to(x.dtype), chosen, *experts.tensors())
    if plain_call(*tensors):
        return _forward(*tensors[:3], experts, keep=False)[0]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    result: Tensor = _moe(*tensors, *experts.settings(), keep)[0]
    return result


def grouped_mm_obstacle(x: Tensor, down: Tensor) -> str | None:
    """Why torch's grouped_mm cannot take such experts, or None: it wants bfloat16 and rows of whole 16 bytes."""
    if GROUPED_MM is None:
        return "this torch has no public grouped_mm"
    if x.dtype != torch.bfloat16:
        return f"torch's grouped_mm takes bfloat16, and x is {x.dtype}"
    if x.shape[1] % 8 or down.shape[2] % 8:
        return f"torch's grouped_mm needs widths that are multiples of 8, not {x.shape[1]} and {down.shape[2]}"
    return None


def moe_grouped_mm(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """The same by torch's grouped_mm, which reads nothing on the host: for GPUs. Shapes as `moe_mlp`."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    expert, order = chosen.flatten().sort(stable=True)
    edges = torch.arange(1, gate_up.shape[0] + 1, device=x.device, dtype=expert.dtype)
    ends = torch.searchsorted(expert, edges, out_int32=True)
    scale = weights.to(x.dtype).flatten()[order, None]
    rows = x.index_select(0, order // chosen.shape[1])
    rows = rows * scale if experts.scale_input else rows
    inner = GROUPED_MM(rows, gate_up.transpose(1, 2), offs=ends)
    del rows  # not beside the outputs, which are as large
    inner = experts.activation(inner if gate_up_bias is None else inner + gate_up_bias[expert])
    out = GROUPED_MM(inner, down.transpose(1, 2), offs=ends)
    out = out if down_bias is None else out + down_bias[expert]
    out = out if experts.scale_input else out * scale
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    summed: Tensor = out.index_select(0, place).view(*chosen.shape, -1).sum(1)
    return summed


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
    chosen: Tensor,
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    given = (gate_up, down, gate_up_bias, down_bias, activation, gated, alpha, limit, up_offset, scale_input)
    return _forward(x, weights, chosen, experts_of(*given), keep)


@_moe.register_fake
def _(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    before = x.new_empty(chosen.numel() if rest[-1] else 0, gate_up.shape[1])
    return torch.empty_like(x, memory_format=torch.contiguous_format), before


@torch.library.custom_op("archcompass::moe_grouped_backward", mutates_args=())
def _moe_backward(
    grad: Tensor,
    before: Tensor,
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
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
    given = (gate_up, down, gate_up_bias, down_bias, activation, gated, alpha, limit, up_offset, scale_input)
    return _backward(grad, before, x, weights, chosen, experts_of(*given))


@_moe_backward.register_fake
def _(grad: Tensor, before: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    given = (x, weights, *rest[:4])
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.settings = inputs[7:13]


def _gradient(ctx: Any, grad: Tensor, _grad_before: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    dx, dw, *parameters = _moe_backward(grad, *saved, *ctx.settings)
    given = (None if kept is None else p for p, kept in zip(parameters, saved[4:], strict=True))
    return dx, dw, None, *given, *[None] * 7


_moe.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.archcompass.moe_grouped)
def _flops(x: Any, weights: Any, chosen: Any, gate_up: Any, down: Any, *settings: Any, **_: Any) -> int:
    return flops_of(x, chosen, down, gated=settings[3])


def flops_of(x: Any, chosen: Any, down: Any, gated: bool) -> int:
    """FLOPs of the forward pass, from shapes."""
    return moe_cost(
        tokens=x[0], hidden=x[1], intermediate=down[2], experts=down[0], top_k=chosen[1], gated=gated, element_bytes=1
    ).flops


def _forward(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts, keep: bool) -> tuple[Tensor, Tensor]:
    """The result and, with `keep`, what the activation was applied to, for the backward pass."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    if x.shape[0] == 1 and not keep:
        return _single_token(x, weights, chosen, experts), x.new_empty(0, gate_up.shape[1])
    nothing, summing = x.new_empty(0, gate_up.shape[1]), None if experts.scale_input else weights
    if not keep and x.is_cpu and x.dtype == torch.bfloat16 and (few := in_batches(chosen, gate_up.shape[0])):
        before = few.multiply(_picked(x, weights, experts, few), gate_up.mT, gate_up_bias)
        out = few.multiply(experts.activation(before), down.mT, down_bias)
        return _combine(out, few.place, chosen.shape, summing), nothing
    groups = by_expert(chosen, gate_up.shape[0])
    if not keep and one_by_one(chosen.numel(), x.shape[1], x.element_size()):
        return _combine(_one_by_one(x, weights, experts, groups), groups.place, chosen.shape, summing), nothing
    before = multiply(_picked(x, weights, experts, groups), gate_up.mT, gate_up_bias, groups)
    out = multiply(experts.activation(before), down.mT, down_bias, groups)
    return _combine(out, groups.place, chosen.shape, summing), before if keep else nothing


def _picked(
    x: Tensor, weights: Tensor, experts: Experts, groups: "Groups | Batches", span: slice = slice(None)
) -> Tensor:
    """The tokens of these rows, as their experts take them."""
    picked = x.index_select(0, groups.token[span])
    return picked.mul_(weights.flatten()[groups.order[span], None]) if experts.scale_input else picked


def _backward(
    grad: Tensor, before: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, both matrices and both biases (empty where there is none)."""
    groups = by_expert(chosen, experts.down.shape[0])
    scale = weights.flatten()[groups.order, None]
    pairs = grad.index_select(0, groups.token)
    d_inner, of_outputs, d_down, d_down_bias = _through_down(pairs, experts.activation(before), scale, experts, groups)
    del pairs  # as large as all tokens' choices together
    d_before = experts.activation.backward(d_inner, before)
    pairs = x.index_select(0, groups.token)
    d_rows, of_inputs, d_gate_up, d_gate_up_bias = _through_gate_up(d_before, pairs, scale, experts, groups)
    d_scale = (of_inputs if experts.scale_input else of_outputs).to(weights.dtype)
    d_weights = torch.empty_like(weights).view(-1).index_copy_(0, groups.order, d_scale).view_as(weights)
    d_x = _combine(d_rows, groups.place, chosen.shape, None)
    return d_x, d_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias


def _through_down(
    grad: Tensor, inner: Tensor, scale: Tensor, experts: Experts, groups: "Groups"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inner rows, of the scale of each output, of `down` and its bias. Overwrites grad [pairs, hidden]."""
    d_inner, d_scale = multiply(grad, experts.down, None, groups), scale
    if not experts.scale_input:
        wide = torch.promote_types(grad.dtype, torch.float32)
        d_scale = (d_inner * inner).sum(-1, dtype=wide)
        if experts.down_bias is not None:
            d_scale += (grad * experts.down_bias[groups.chosen]).sum(-1, dtype=wide)
        grad, d_inner = grad.mul_(scale), d_inner.mul_(scale)
    d_down = _weight_gradients(grad, inner, experts.down, groups)
    return d_inner, d_scale, d_down, _row_sums(grad, experts.down_bias, groups)


def _through_gate_up(
    grad: Tensor, rows: Tensor, scale: Tensor, experts: Experts, groups: "Groups"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows, of the scale of each, of `gate_up` and its bias. Overwrites rows [pairs, hidden]."""
    d_rows, d_scale = multiply(grad, experts.gate_up, None, groups), scale
    if experts.scale_input:
        d_scale = (d_rows * rows).sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        d_rows, rows = d_rows.mul_(scale), rows.mul_(scale)
    d_gate_up = _weight_gradients(grad, rows, experts.gate_up, groups)
    return d_rows, d_scale, d_gate_up, _row_sums(grad, experts.gate_up_bias, groups)


def _single_token(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """A decode step: one view of each chosen expert, no sorting, no copy of weights."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    if x.is_cpu and x.dtype in BY_COLUMNS and gate_up.mT.is_contiguous() and down.mT.is_contiguous():
        return _single_by_columns(x, weights[0], chosen[0], experts)
    picked = chosen[0].tolist()
    fed = (x * weights.t()).split(1) if experts.scale_input else [x] * len(picked)
    into = [linear(row, gate_up[e], _row(gate_up_bias, e)) for row, e in zip(fed, picked, strict=True)]
    inner = experts.activation(torch.cat(into)).split(1)
    rows = torch.cat([linear(row, down[e], _row(down_bias, e)) for row, e in zip(inner, picked, strict=True)])
    return (rows if experts.scale_input else rows * weights[0, :, None]).sum(0, keepdim=True)


def _single_by_columns(x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """All chosen experts at once, of matrices that lie by columns, as `linear` takes one: columns are picked and summed."""
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    columns, offsets = bags(x.shape[1], 1)[0], bags(x.shape[1], len(chosen))[1]
    fed = (x * weights[:, None]).flatten() if experts.scale_input else repeated(x, len(chosen))
    into = summed_rows(gate_up.mT.flatten(0, 1), (chosen[:, None] * x.shape[1] + columns).flatten(), offsets, fed)
    inner = experts.activation(into if gate_up_bias is None else into + gate_up_bias[chosen])
    scale = torch.ones_like(weights) if experts.scale_input else weights
    columns = (chosen[:, None] * inner.shape[1] + bags(inner.shape[1], 1)[0]).flatten()
    out = sum_of_rows(down.mT.flatten(0, 1), columns, (inner * scale[:, None]).flatten())
    out = out if down_bias is None else out + sum_of_rows(down_bias, chosen, scale)
    return out[None]


@dataclass(frozen=True, slots=True)
class Groups:
    """All (token, choice) pairs sorted by expert: the order, the token and the expert of each, and each expert's end."""

    order: Tensor
    token: Tensor
    chosen: Tensor
    ends: Tensor

    @property
    def place(self) -> Tensor:
        """The row of each pair."""
        rows = torch.arange(self.order.numel(), device=self.order.device)
        return torch.empty_like(self.order).scatter_(0, self.order, rows)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Each busy expert and its stretch of the pairs."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = end


def by_expert(experts: Tensor, count: int) -> Groups:
    """The pairs of [tokens, k] chosen experts, sorted by which of the `count` experts they chose."""
    chosen, order = experts.flatten().sort(stable=True)
    ends = torch.bincount(chosen, minlength=count).cumsum(0, dtype=torch.int32)
    return Groups(order, order // experts.shape[1], chosen, ends)


def _one_by_one(x: Tensor, weights: Tensor, experts: Experts, groups: Groups) -> Tensor:
    """Both products of one expert before the next, whose rows are gathered in their turn.

    Where the rows between the products stay in the cache, all first products come before all second ones: they then read
    the matrices in the order in which these lie, which is faster by a third.
    """
    gate_up, down, gate_up_bias, down_bias = experts.tensors()
    pairs = groups.order.shape[0]
    if 0 < pairs * gate_up.shape[1] <= CACHED_ELEMENTS:
        inner = experts.activation(_of_each(_picked(x, weights, experts, groups), gate_up, gate_up_bias, groups))
        return _of_each(inner, down, down_bias, groups)
    out = down.new_empty(pairs, down.shape[1])
    for expert, span in groups.runs():
        inner = experts.activation(
            linear(_picked(x, weights, experts, groups, span), gate_up[expert], _row(gate_up_bias, expert))
        )
        out[span] = linear(inner, down[expert], _row(down_bias, expert))
    return out


def _of_each(rows: Tensor, matrices: Tensor, biases: Tensor | None, groups: Groups) -> Tensor:
    """Each row times the transposed matrix of its expert, [E, N, K], plus its expert's bias."""
    return torch.cat([linear(rows[span], matrices[e], _row(biases, e)) for e, span in groups.runs()])


def multiply(rows: Tensor, matrices: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Each row times the [K, N] matrix of its expert, plus its expert's bias."""
    if _takes_grouped_mm(rows, matrices):
        out: Tensor = GROUPED_MM(rows, matrices, offs=groups.ends)
    else:
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        for expert, span in groups.runs():
            product(rows[span], matrices[expert], out[span])
    return out if bias is None else out.add_(bias[groups.chosen])


def _takes_grouped_mm(rows: Tensor, matrices: Tensor) -> bool:
    """Torch's grouped product costs less to call than the loop, has half its speed in float32, and wants whole 16 bytes."""
    if GROUPED_MM is None or rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.bfloat16):
        return False
    if rows.dtype == torch.float32 and rows.shape[0] * matrices[0].numel() >= WORTH_A_CALL * matrices.shape[0]:
        return False
    whole = all(size * rows.element_size() % 16 == 0 for size in matrices.shape[1:])
    return whole and rows.shape[0] > 0 and rows.stride(-1) == 1 and 1 in matrices.stride()[1:]


def _weight_gradients(left: Tensor, right: Tensor, like: Tensor, groups: Groups) -> Tensor:
    """Σ over an expert's rows of leftᵀ right; zeros for an idle expert."""
    total = torch.empty_like(like, memory_format=torch.contiguous_format)
    idle = set(range(total.shape[0]))
    for expert, span in groups.runs():
        product(left[span].t(), right[span], total[expert])
        idle.remove(expert)
    for expert in idle:
        total[expert].zero_()
    return total


def _row_sums(rows: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    if bias is None:
        return rows.new_empty(0)
    total = torch.zeros_like(bias)
    for expert, span in groups.runs():
        total[expert] = rows[span].sum(0)
    return total


def _combine(rows: Tensor, place: Tensor, shape: torch.Size, weights: Tensor | None) -> Tensor:
    """Rows of which `place` holds that of each pair, to their tokens' (weighted) sums [tokens, width]."""
    if rows.device.type == "cpu":  # torch's operator itself: its wrapper takes as long as the sums of a few tokens
        scale, first = None if weights is None else weights.flatten(), torch.arange(0, place.numel(), shape[1])
        return torch.embedding_bag(rows, place, first, mode=0, per_sample_weights=scale)[0]
    picked = rows.index_select(0, place).view(*shape, -1)
    return picked.sum(1) if weights is None else torch.bmm(weights.unsqueeze(1), picked).squeeze(1)


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
