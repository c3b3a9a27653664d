"""What a training step costs beyond three times its forward pass: blocks and the head with its loss forward and backward,
and the optimizer's pass over the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from archcompass.blocks.base import Block, Op, gemm
from archcompass.profiles.efficiency import Curve, Efficiency, KindEfficiency, seconds
from archcompass.profiles.measure import build
from archcompass.profiles.measure.clock import repeat
from archcompass.profiles.measure.parts import alone
from archcompass.profiles.measure.products import share
from archcompass.profiles.predict import sublayer_work, update_of
from archcompass.profiles.request import Request

TOKENS = 256
VOCABULARY, WIDTH = 32000, 768

LEAST = 0.5
"""A step holds its forward pass, a third of its work, and a backward pass that is no shorter; less than this is noise."""

Forward = Callable[[], torch.Tensor]


def training(
    device: torch.device, table: Efficiency, name: str, blocks: list[tuple[Block, int]], deadline: float
) -> dict[str, float]:
    """Seconds of a training step over three times the forward pass as `table` foresees it, by "block:dtype"; "gemm:dtype"
    and "head:dtype" for products alone and for the head with its loss. Blocks that would begin after `deadline` are left
    out."""
    dtype = build.DTYPES[name]
    with _learning():
        found = {"gemm": _gemm(device, table, name, dtype), "head": _head(device, table, name, dtype)}
        found |= {
            block.kind: _block(device, table, name, block, width)
            for block, width in blocks
            if time.perf_counter() < deadline
        }
    return {f"{owner}:{name}": round(min(8.0, max(LEAST, value)), 4) for owner, value in found.items()}


def optimizer(device: torch.device, table: Efficiency, name: str) -> KindEfficiency:
    """AdamW over eight matrices of two million weights, as the trained models hold theirs."""
    with _learning():
        weights = [torch.randn(1024, 2048, device=device).to(build.DTYPES[name]).requires_grad_() for _ in range(8)]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        spent = repeat(torch.optim.AdamW(weights, lr=1e-5).step, device, seconds=0.4, least=3, most=10).ms * 1e-3
    update = update_of(sum(weight.numel() for weight in weights), _asked(name))
    reached = share(update.bytes / table.peaks["bandwidth"], spent)
    return KindEfficiency(compute=Curve.constant(1.0), memory=Curve.constant(reached), launch_seconds=0.0)


@contextmanager
def _learning() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _asked(name: str) -> Request:
    return Request(precision=name, mode="training", generate=0, prompt=TOKENS)


def _foreseen(table: Efficiency, op: Op, owner: str = "") -> float:
    """Seconds of all runs of `op`, whose work is that of a training step, at the pace of a forward pass."""
    curves, peaks = table.of(op, owner), table.peaks
    spent = seconds(op, curves, peaks.get(op.compute, peaks["fp32"]), peaks["bandwidth"])
    return (spent + curves.launch_seconds) * op.count


def _seconds(forward: Forward, leaves: list[torch.Tensor], device: torch.device) -> float:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(torch.ones_like(y))

    return repeat(step, device, seconds=0.2, least=3, most=10).ms * 1e-3


def _gemm(device: torch.device, table: Efficiency, name: str, dtype: torch.dtype) -> float:
    """Forward, towards the input and towards the weight, with a weight of ordinary size."""
    x, weight = (torch.randn(n, WIDTH, device=device).to(dtype).requires_grad_() for n in (TOKENS, WIDTH))
    spent = _seconds(lambda: torch.nn.functional.linear(x, weight), [x, weight], device)
    op = gemm(_asked(name).step(TOKENS), "product", TOKENS, WIDTH, WIDTH)
    return spent / _foreseen(table, op)


def _head(device: torch.device, table: Efficiency, name: str, dtype: torch.dtype) -> float:
    """The product with the vocabulary and the loss over it."""
    from archcompass.blocks.embedding.spec import Head
    from archcompass.kernels.cross_entropy import linear_cross_entropy

    x = torch.randn(TOKENS, WIDTH, device=device).to(dtype).requires_grad_()
    # Ordinary weights: with larger ones nearly all probabilities are denormal, and products with those are slow.
    weight = torch.randn(VOCABULARY, WIDTH, device=device).mul_(0.02).to(dtype).requires_grad_()
    targets = torch.arange(TOKENS, device=device)
    spent = _seconds(lambda: linear_cross_entropy(x, weight, targets), [x, weight], device)
    head = Head(vocab_size=VOCABULARY).work(WIDTH, _asked(name).step(TOKENS))
    return spent / sum(_foreseen(table, op, "head") for op in head)


def _block(device: torch.device, table: Efficiency, name: str, block: Block, width: int) -> float:
    operations = sublayer_work(alone(block, width), "block", _asked(name).step(TOKENS))
    foreseen = sum(_foreseen(table, op, owner) for owner, op in operations)
    return _trained(device, build.DTYPES[name], block, width) / foreseen


def _trained(device: torch.device, dtype: torch.dtype, block: Block, width: int) -> float:
    """Seconds of one sublayer, forward and backward."""
    from archcompass.blocks.runtime import Context

    layer = build.sublayer(alone(block, width), "block", device, dtype).train()
    x = torch.randn(1, TOKENS, width, device=device).to(dtype).requires_grad_()

    def forward() -> torch.Tensor:
        y: torch.Tensor = layer(x, None, Context(keep_state=False, embeddings=x))[0]
        return y

    return _seconds(forward, [x, *layer.parameters()], device)
