"""`linear_cross_entropy`: the loss of a language model's head behind one name, with the backend and its reason."""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.cross_entropy.chunked import losses_of, weighted_loss
from archcompass.kernels.cross_entropy.memory import chunk_tokens
from archcompass.kernels.cross_entropy.reference import linear_cross_entropy_reference
from archcompass.kernels.dispatch import Choice, choose


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    chunk: int | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Cross entropy of softmax(cap(scale · hidden weightᵀ)) at the targets, without holding all logits.

    Args:
        hidden: [tokens, d].
        weight: [vocab, d], the output head.
        targets: [tokens] int64 classes, or `ignore_index` for tokens that do not count.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2).
        scale: factor on the logits, before the cap (Granite divides them: scale = 1 / logits_scaling).
        reduction: "mean" over the tokens that count (0 when there are none), "sum" or "none".
        chunk: tokens whose logits (with "triton", as many of their gradients) exist at a time; None for about 64 MiB.
        backend: "auto", "reference", "torch" or "triton".
        strict: with "auto", refuse to fall back from the fastest backend.

    Returns:
        A scalar, or [tokens] with reduction "none"; at least float32.

    Raises:
        InputError: shapes or settings that do not fit together.
        BackendError: the backend asked for cannot serve this call.
    """
    _check(hidden, weight, targets, reduction, chunk)
    choice = explain(hidden, backend=backend, strict=strict)
    if choice.backend == "reference":
        return linear_cross_entropy_reference(
            hidden, weight, targets, ignore_index=ignore_index, soft_cap=soft_cap, scale=scale, reduction=reduction
        )
    rest = (ignore_index, soft_cap, scale, chunk or chunk_tokens(weight.shape[0]))
    learning = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if choice.backend == "triton":
        from archcompass.kernels.cross_entropy.triton_op import losses_triton

        losses = losses_triton(hidden, weight, targets, *rest)
    elif reduction != "none" and learning:
        return weighted_loss(hidden, weight, targets, _token_weights(hidden, targets, ignore_index, reduction), *rest)
    else:
        losses = losses_of(hidden, weight, targets, *rest)
    return losses if reduction == "none" else (losses * _token_weights(hidden, targets, ignore_index, reduction)).sum()


def explain(hidden: Tensor, *, backend: str = "auto", strict: bool = False) -> Choice:
    """Which implementation `linear_cross_entropy` takes for `hidden`, and why."""
    refusals = {"triton": "the kernel sums in float32, and hidden is float64"} if hidden.dtype == torch.float64 else {}
    return choose("linear_cross_entropy", backend, hidden.device, refusals=refusals, strict=strict)


def _token_weights(hidden: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What each token's loss counts for: 1 for the sum, 1 / (tokens that count) for the mean."""
    counted = (targets != ignore_index).to(torch.promote_types(hidden.dtype, torch.float32))
    return counted / counted.sum().clamp(min=1.0) if reduction == "mean" else counted


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk: int | None) -> None:
    shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(f"{shapes}: linear_cross_entropy takes [tokens, d], [vocab, d] and [tokens]")
    if targets.shape != hidden.shape[:1]:
        raise InputError(f"{shapes}: one target per token, [{hidden.shape[0]}]")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction is {reduction!r}; choose mean, sum or none")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; it must be at least 1 token")
