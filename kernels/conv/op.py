"""The public face of the causal depthwise convolution: checks, choice of backend, registration with torch."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archcompass.errors import InputError
from archcompass.kernels.conv import chunked
from archcompass.kernels.conv.cost import causal_conv_cost
from archcompass.kernels.conv.reference import reference
from archcompass.kernels.dispatch import Backend, Choice, choose
from archcompass.kernels.eager import plain_call
from archcompass.kernels.packed import spans

OPERATION = "causal_conv"


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y_t = activation(bias + sum_i w_i x_(t - width + 1 + i)), per channel.

    Args:
        x: [batch, time, channels].
        weight: [channels, width]; the last column meets the current token.
        bias: [channels], or None.
        activation: None, or "silu" applied to the sum before it is rounded to the dtype of x.
        initial_state: the width - 1 tokens before the first one, oldest first, [batch, width - 1, channels] (one per
            sequence when packed); None is zeros.
        cu_seqlens: boundaries of packed sequences, [sequences + 1], from 0 to time; the batch must be 1.
        backend: "auto", or the implementation to use.
        strict: with "auto", refuse to fall back from the fastest backend of the device.

    Returns:
        outputs [batch, time, channels] in the dtype of x, and the state for the next segment, like initial_state.

    Raises:
        InputError: shapes that do not belong together, or an unknown activation.
        BackendError: the backend cannot run here.
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    if backend == "auto" and _plain_step(x, weight, initial_state, cu_seqlens):
        return chunked.step(x, initial_state, weight, bias, activation == "silu")  # type: ignore[arg-type]
    chosen = explain(x, backend=backend, strict=strict).backend
    past = weight.shape[1] - 1
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    before = x.new_zeros(sequences, past, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    if chosen == "triton":
        from archcompass.kernels.conv.triton_conv import causal_conv_triton_op

        y = causal_conv_triton_op(x, before, weight, bias, cu_seqlens, activation == "silu")
        return y, _last_tokens(x, before) if cu_seqlens is None else _last_packed_tokens(x, before, cu_seqlens)
    if cu_seqlens is None:
        return _dense(x, weight, bias, activation == "silu", before, chosen)
    outputs, states = [x[:, :0]], [before[:0]]
    for n, (start, end) in enumerate(spans(cu_seqlens, x.shape[1])):
        out, state = _dense(x[:, start:end], weight, bias, activation == "silu", before[n : n + 1], chosen)
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _plain_step(x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether this is a decoding step on the CPU, where an operator's wrapping costs more than its work."""
    if x.shape[1] != 1 or initial_state is None or cu_seqlens is not None or x.device.type != "cpu":
        return False
    return x.dtype == initial_state.dtype and plain_call(x, weight)


def explain(x: Tensor, *, backend: Backend = "auto", strict: bool = False) -> Choice:
    """Which implementation serves a call with this input, and why."""
    refusals = {"triton": "the kernels sum in float32, and x is float64"} if x.dtype == torch.float64 else {}
    return choose(OPERATION, backend, x.device, refusals=refusals, strict=strict)


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, before: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """One segment of equally long sequences, and the last width - 1 tokens it leaves."""
    state = _last_tokens(x, before)
    if backend == "reference":
        return reference(x, weight, bias, before, silu), state
    serve = chunked.forward if plain_call(x, weight, bias, before) else causal_conv_op
    return serve(x, before, weight, bias, silu), state


def _last_tokens(x: Tensor, before: Tensor) -> Tensor:
    """The tokens that the next segment needs, [batch, width - 1, channels]."""
    past = before.shape[1]
    left = x if x.shape[1] >= past else torch.cat([before, x], dim=1)
    return left[:, left.shape[1] - past :].clone()


def _last_packed_tokens(x: Tensor, before: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same for packed sequences, without reading their boundaries on the host."""
    past = before.shape[1]
    at = cu_seqlens[1:, None] - past + torch.arange(past, device=x.device)  # rows of x; too early ones lie in `before`
    early = at - cu_seqlens[:-1, None]
    from_x = x[0][at.clamp(0, max(x.shape[1] - 1, 0))] if x.shape[1] else before
    length = cu_seqlens.diff()[:, None, None].clamp(max=past)
    kept = (torch.arange(past, device=x.device)[None, :, None] + length).clamp(max=past - 1).expand_as(before)
    return torch.where((early >= 0)[..., None], from_x, before.gather(1, kept.to(torch.int64)))


@torch.library.custom_op("archcompass::causal_conv", mutates_args=())
def causal_conv_op(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The convolution without its next state, in plain torch."""
    return chunked.forward(x, before, weight, bias, silu)


@causal_conv_op.register_fake
def _(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    d_x, d_before, d_weight, d_bias = causal_conv_backward_op(grad, *saved, ctx.silu)
    return d_x, d_before, d_weight, None if saved[3] is None else d_bias, None


causal_conv_op.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("archcompass::causal_conv_backward", mutates_args=())
def causal_conv_backward_op(
    grad: Tensor, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the convolution with respect to x, `before`, `weight` and `bias`."""
    return chunked.backward(grad, x, before, weight, bias, silu)


@causal_conv_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_weight = weight.new_empty(weight.shape)
    return x.new_empty(x.shape), before.new_empty(before.shape), d_weight, weight.new_empty(weight.shape[0])


@register_flop_formula(torch.ops.archcompass.causal_conv)
def conv_flops(x_shape, before_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """FLOPs of the operators, from the shapes of their arguments."""
    batch, time, channels = x_shape
    return causal_conv_cost(
        batch=batch, new_tokens=time, channels=channels, width=weight_shape[1], element_bytes=1
    ).flops


@register_flop_formula(torch.ops.archcompass.causal_conv_backward)
def _backward_flops(grad_shape, x_shape, before_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * conv_flops(x_shape, before_shape, weight_shape)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if activation not in (None, "silu"):
        raise InputError(f"activation is {activation!r}; choose None or 'silu'")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise InputError(
            f"x {list(x.shape)} and weight {list(weight.shape)} must be [batch, time, channels] and [channels, width]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias has shape {list(bias.shape)}; it must be {list(weight.shape[:1])}")
    sequences = x.shape[0]
    if cu_seqlens is not None:
        if sequences != 1:
            raise InputError(f"packed sequences need a batch of 1, not {sequences}")
        sequences = cu_seqlens.numel() - 1
    expected = (sequences, weight.shape[1] - 1, x.shape[2])
    if initial_state is not None and initial_state.shape != expected:
        raise InputError(f"initial_state has shape {list(initial_state.shape)}; it must be {list(expected)}")
