"""The head and its loss, forward and backward together. Beside all logits in torch, and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from archcompass.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_cost
from archcompass.kernels.dispatch import Backend
from gpu_suite.case import Case, Inputs, Maker, Shape, Work, package, work


def loss_inputs(make: Maker, s: Shape) -> Inputs:
    targets = torch.randint(s["vocab"], (s["tokens"],), device=make.device)
    weight = make.normal(s["vocab"], s["width"]).mul_(s["width"] ** -0.5)
    return {"hidden": make.normal(s["tokens"], s["width"]), "weight": weight, "targets": targets}


def loss_call(backend: Backend, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return linear_cross_entropy(hidden, weight, targets, backend=backend)


def loss_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return cross_entropy((hidden @ weight.t()).float(), targets)


def loss_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return package("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")(hidden, weight, targets)


def loss_work(s: Shape) -> Work:
    sizes = {"tokens": s["tokens"], "width": s["width"], "vocab": s["vocab"]}
    head_bytes = 2 * s["vocab"] * s["width"] * 2  # read, and its gradient written
    return work(linear_cross_entropy_cost(**sizes, element_bytes=2, training=True), head_bytes)


def cases() -> Iterator[Case]:
    yield Case(
        operation="cross_entropy", kind="forward and backward", size="4096 to 128256, 8192 tokens",
        real={"tokens": 8192, "width": 4096, "vocab": 128256}, check={"tokens": 203, "width": 512, "vocab": 4000},
        tiny={"tokens": 7, "width": 16, "vocab": 50}, inputs=loss_inputs, call=loss_call, work=loss_work, together=True,
        peers={"torch, all logits": loss_torch, "Liger": loss_liger}, gradients=("hidden", "weight"), quick=True,
    )  # fmt: skip
