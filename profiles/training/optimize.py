"""Weights, AdamW and the cosine schedule of a run, and one step of it.

With bf16 the blocks compute in bfloat16 while the optimizer keeps the weights in float32 beside them (Micikevicius et al.,
arXiv 1710.03740): a small update would be lost in bfloat16's eight bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from archcompass.blocks.model.module import LanguageModel
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.runtime import BlockModule
from archcompass.errors import MeasurementError
from archcompass.profiles.training.plan import Plan


class Learner:
    """A model in training.

    Args:
        spec: what is trained.
        plan: how.
        device: where.

    Attributes:
        kept: the weights the optimizer moves and checkpoints hold, in float32.
        model: the blocks that compute; `kept` itself in fp32.
        optimizer, schedule: of `kept`.
    """

    def __init__(self, spec: ModelSpec, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.kept = spec.build(device=device, dtype=torch.float32).train()
        self.model = self.kept if plan.precision == "fp32" else _twin(self.kept, device)
        self.optimizer = AdamW(_groups(self.kept, plan), lr=plan.learning_rate, betas=(plan.beta1, plan.beta2))
        self.schedule = _schedule(self.optimizer, plan)

    def load(self) -> None:
        """Takes what `kept` holds into the blocks that compute."""
        if self.model is not self.kept:
            self.model.load_state_dict(self.kept.state_dict())

    def step(self, wrapped: nn.Module, ids: Tensor, targets: Tensor) -> float:
        """One step; returns the loss before it.

        Args:
            wrapped: `model`, or what spreads it over processes.
            ids, targets: [batch, sequence].

        Raises:
            MeasurementError: the loss is no longer a number.
        """
        self.model.zero_grad(set_to_none=True)
        loss: Tensor = wrapped(ids, labels=targets).loss
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise MeasurementError(f"the loss became {value}; a lower learning_rate may hold it")
        self._hand_over_gradients()
        clip_grad_norm_(self.kept.parameters(), self.plan.clip)
        self.optimizer.step()
        self.schedule.step()
        self._after_step()
        return value

    def _hand_over_gradients(self) -> None:
        if self.model is not self.kept:
            for ours, theirs in zip(self.kept.parameters(), self.model.parameters(), strict=True):
                ours.grad = None if theirs.grad is None else theirs.grad.to(ours.dtype)

    @torch.no_grad()
    def _after_step(self) -> None:
        """Blocks that act by themselves do so on the moved weights; what they change is kept as well."""
        is_twin = self.model is not self.kept
        if is_twin:
            _copy(self.kept.parameters(), self.model.parameters())
        for module in self.model.modules():
            if isinstance(module, BlockModule):
                module.after_step()
        if is_twin:
            _copy(self.model.buffers(), self.kept.buffers())


def _copy(sources: Iterator[Tensor], targets: Iterator[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _twin(model: LanguageModel, device: torch.device) -> LanguageModel:
    twin = model.spec.build(device=device, dtype=torch.bfloat16).train()
    twin.load_state_dict(model.state_dict())
    return twin


def _groups(model: nn.Module, plan: Plan) -> list[dict[str, object]]:
    """Matrices decay; vectors, which are norms, biases and decay rates, do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _schedule(optimizer: AdamW, plan: Plan) -> LRScheduler:
    cosine = CosineAnnealingLR(optimizer, plan.decay_steps, eta_min=plan.learning_rate * plan.final_share)
    if not plan.warmup_steps:
        return cosine
    warmup = LinearLR(optimizer, start_factor=1 / (plan.warmup_steps + 1), total_iters=plan.warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[plan.warmup_steps])
