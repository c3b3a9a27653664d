"""The public face of RMS normalisation: checks, the residual, choice of backend."""

from functools import lru_cache
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.errors import InputError
from archcompass.kernels.dispatch import Backend, Choice, choose, settled
from archcompass.kernels.eager import plain_call
from archcompass.kernels.norm.memory import PIECE_ELEMENTS
from archcompass.kernels.norm.reference import ACTIVATIONS, Rule, reference
from archcompass.kernels.norm.tiles import WIDEST_GROUP

OPERATION = "rms_norm"
A_STEP = 1 << 13  # elements of a decoding step, of which torch's own function makes less fuss, with the same roundings


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: None = None,
    gate: Tensor | None = None,
    gate_first: bool = True,
    gate_activation: str = "silu",
    group_size: int | None = None,
    unit_offset: bool = False,
    backend: Backend = "auto",
    strict: bool = False,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor,
    gate: Tensor | None = None,
    gate_first: bool = True,
    gate_activation: str = "silu",
    group_size: int | None = None,
    unit_offset: bool = False,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    gate_first: bool = True,
    gate_activation: str = "silu",
    group_size: int | None = None,
    unit_offset: bool = False,
    backend: Backend = "auto",
    strict: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalisation of the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

    Everything after the residual sum is computed in float32 (float64 for float64 inputs) and rounded once, at the end,
    to the dtype of x; in particular the weight multiplies before the rounding, and the gate is not rounded.

    Args:
        x: [..., width].
        weight: [width], or None for none; multiplied as given, or as 1 + weight with `unit_offset` (Gemma).
        eps: added to the mean of the squares.
        residual: added to x in the dtype of x before anything else; the sum, rounded, is what is normalised and
            returned.
        gate: z, like x.
        gate_first: normalise x * act(z) (Mamba-2); otherwise normalise x, then multiply by act(z) after the weight
            (Gated DeltaNet).
        gate_activation: act, "silu" or "sigmoid".
        group_size: normalise groups of this many neighbours, each by its own mean; None is the whole width.
        unit_offset: the weight is stored minus one.
        backend: "auto", or the implementation to use.
        strict: with "auto", refuse to fall back from the fastest backend of the device.

    Returns:
        the normalised x; with a residual, that and residual + x.

    Raises:
        InputError: shapes that do not belong together, or an unknown activation.
        BackendError: the backend cannot run here.
    """
    _check(x, weight, residual, gate, gate_activation, group_size)
    size = group_size or x.shape[-1]
    if gate is None and residual is None and x.numel() == size and settled(backend, x) and plain_call(x, weight):
        return _one_row(x, weight, eps, unit_offset)
    chosen = "torch" if settled(backend, x) else explain(x, group_size=size, backend=backend, strict=strict).backend
    if chosen == "triton":
        from archcompass.kernels.norm.triton_norm import rms_norm_op

        sigmoid = gate_activation == "sigmoid"
        y, summed, _ = rms_norm_op(x, weight, residual, gate, eps, gate_first, sigmoid, size, unit_offset)
        return y if residual is None else (y, summed)
    summed = x if residual is None else residual + x
    serve = _reference if chosen == "reference" else _by_blocks
    y = serve(summed, gate, weight, Rule(eps, gate_first, gate_activation, size, unit_offset))
    return y if residual is None else (y, summed)


def explain(x: Tensor, *, group_size: int | None = None, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with this input, and why."""
    refusals = {}
    if x.dtype == torch.float64:
        refusals["triton"] = "the kernel sums in float32, and x is float64"
    elif (size := group_size or x.shape[-1]) > WIDEST_GROUP:
        refusals["triton"] = f"the kernel holds a group in registers, and {size} is more than {WIDEST_GROUP}"
    return choose(OPERATION, backend, x.device, refusals=refusals, strict=strict)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Statistics are float32, float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reference(x: Tensor, gate: Tensor | None, weight: Tensor | None, rule: Rule) -> Tensor:
    gate, weight = (None if t is None else t.to(sum_dtype(x)) for t in (gate, weight))
    return reference(x.to(sum_dtype(x)), gate, weight, rule).to(x.dtype)


def _by_blocks(x: Tensor, gate: Tensor | None, weight: Tensor | None, rule: Rule) -> Tensor:
    """`_torch`; on a CPU without a graph, in place and a few rows at a time, so that each pass finds them in the cache."""
    recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if recorded or x.device.type != "cpu":
        return _torch(x, gate, weight, rule)
    if gate is None and rule.group_size == x.shape[-1] and x.numel() <= A_STEP:
        return _step(x, weight, rule)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() <= 2 * PIECE_ELEMENTS:
        return _into(out, x, gate, weight, rule)
    rows, gates, places = _rows(x), None if gate is None else _rows(gate), _rows(out)
    step = max(1, torch.get_num_threads() * PIECE_ELEMENTS // rows[0].numel())
    for start in range(0, rows.shape[0], step):
        here = slice(start, start + step)
        _into(places[here], rows[here], None if gates is None else gates[here], weight, rule)
    return out


def _rows(x: Tensor) -> Tensor:
    """[rows, width], or [tokens, heads, width]: heads cut out of a wider projection would be copied to lie in rows."""
    return x.flatten(0, -2 if x.dim() < 4 else -3)


def _step(x: Tensor, weight: Tensor | None, rule: Rule) -> Tensor:
    """The few rows of a decoding step, where an operation of torch costs more than its work."""
    if weight is None or (weight.dtype == x.dtype and not rule.unit_offset):
        return F.rms_norm(x, (rule.group_size,), weight, rule.eps)
    return _torch(x, None, weight, rule)


def _one_row(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    """One row by its length, a number; a product with three factors is taken in float32 and rounded once."""
    one = _constant(1.0, sum_dtype(x))
    wide = x.type_as(one)  # half the time of `x.to(dtype)`
    length = torch.linalg.vector_norm(wide).item()
    scale: float = (length * length / x.numel() + eps) ** -0.5
    if weight is None:
        return x * scale
    weight = torch.add(weight, one) if unit_offset else weight
    if weight.dtype == x.dtype:
        return torch.addcmul(_constant(0.0, x.dtype), x, weight, value=scale)
    return torch.addcmul(_constant(0.0, one.dtype), wide, weight, value=scale).type_as(x)


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """[1], by which a sum is of the wider type, and which torch need not make of a number at every call.

    An ordinary tensor even when first asked for in inference mode.
    """
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=dtype)


def _torch(x: Tensor, gate: Tensor | None, weight: Tensor | None, rule: Rule) -> Tensor:
    """Plain torch around its own rms_norm, which is one pass over the data."""
    dtype = sum_dtype(x)
    scale = None if weight is None else weight.to(dtype)
    if scale is not None and rule.unit_offset:
        scale = scale + 1
    wide = x.to(dtype)
    opened = None if gate is None else ACTIVATIONS[rule.gate_activation](gate.to(dtype))
    if opened is not None and rule.gate_first:
        wide = wide * opened
    if rule.group_size == x.shape[-1]:
        y = F.rms_norm(wide, (rule.group_size,), scale, rule.eps)
    else:
        y = F.rms_norm(wide.unflatten(-1, (-1, rule.group_size)), (rule.group_size,), None, rule.eps).flatten(-2)
        y = y if scale is None else y * scale
    if opened is not None and not rule.gate_first:
        y = y * opened
    return y.to(x.dtype)


def _into(out: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, rule: Rule) -> Tensor:
    """The same, computed in `out` where that is wide enough, with one pass for the squares; no gradients."""
    dtype = sum_dtype(x)
    y = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype, memory_format=torch.contiguous_format)
    opened = None if gate is None else ACTIVATIONS[rule.gate_activation](gate.to(dtype))
    y.copy_(x)
    if opened is not None and rule.gate_first:
        y.mul_(opened)
    groups = y.unflatten(-1, (-1, rule.group_size))
    lengths = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
    eps = _constant(rule.eps, dtype)
    groups.mul_(torch.addcmul(eps, lengths, lengths, value=1 / rule.group_size).rsqrt_())
    if weight is not None:
        y.mul_(torch.add(weight, _constant(1.0, dtype)) if rule.unit_offset else weight)
    if opened is not None and not rule.gate_first:
        y.mul_(opened)
    return out if y is out else out.copy_(y)


def _check(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_activation: str,
    group_size: int | None,
) -> None:
    width = x.shape[-1]
    if weight is not None and weight.shape != (width,):
        raise InputError(f"weight has shape {list(weight.shape)}; it must be [{width}], the width of x")
    for name, other in (("residual", residual), ("gate", gate)):
        if other is not None and other.shape != x.shape:
            raise InputError(f"{name} has shape {list(other.shape)}; it must be {list(x.shape)}, that of x")
    if gate_activation not in ACTIVATIONS:
        raise InputError(f"gate_activation is {gate_activation!r}; choose {' or '.join(ACTIVATIONS)}")
    if group_size is not None and (group_size < 1 or width % group_size):
        raise InputError(f"group_size is {group_size}, which does not divide the width {width}")
