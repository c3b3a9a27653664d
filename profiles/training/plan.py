"""What a training run is asked to do, and what it tells. No torch here."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archcompass.blocks.base import explain
from archcompass.errors import InputError


class Plan(BaseModel):
    """How to train. Two runs with equal plans on equal data and one machine make equal weights.

    Attributes:
        steps: optimizer steps in all.
        batch: sequences per step, over all processes.
        sequence: tokens per sequence.
        learning_rate: the highest, after the warm-up.
        warmup: steps of linear warm-up; None takes a tenth of all, at most 2000.
        final_share: what is left of the learning rate at the end of the cosine.
        weight_decay, beta1, beta2: of AdamW; vectors (norms, biases, decays) are not decayed.
        clip: the largest norm of the gradient.
        held_out: share of the data, its end, that is never trained on.
        evaluations: times the held-out loss is taken, spread evenly; it is taken at the start as well.
        keep_every: steps between two checkpoints; None takes a tenth of all.
        precision: what blocks compute in. With bf16 the optimizer keeps the weights in float32 beside it.
        seed: of the weights and of the order of the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1, le=10_000_000)
    batch: int = Field(default=8, ge=1, le=65536)
    sequence: int = Field(default=256, ge=2, le=2**24)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    warmup: int | None = Field(default=None, ge=0)
    final_share: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    evaluations: int = Field(default=4, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps and self.steps > 1:
            raise InputError(f"warmup ({self.warmup}) must be fewer than steps ({self.steps})")
        return self

    @classmethod
    def asked(cls, **wishes: Any) -> Self:
        """A plan of what was asked for; None leaves the default.

        Raises:
            SpecError: names the field, the value and the rule.
        """
        try:
            return cls.model_validate({key: value for key, value in wishes.items() if value is not None})
        except ValidationError as error:
            raise explain(error, fields=cls.model_fields) from error

    @property
    def decay_steps(self) -> int:
        """Steps of the cosine after the warm-up."""
        return max(self.steps - self.warmup_steps, 1)

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return min(self.steps // 10, 2000) if self.warmup is None else self.warmup

    @property
    def bytes_per_parameter(self) -> int:
        """Weights, gradients and two moments; with bf16 those of both precisions."""
        return 16 if self.precision == "fp32" else 20

    def is_kept(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps."""
        return step == self.steps or step % (self.keep_every or max(1, self.steps // 10)) == 0

    def is_told(self, step: int) -> bool:
        """Whether the loss of this step is among those reported: all, or about a thousand of them."""
        return step in (1, self.steps) or step % -(-self.steps // 1000) == 0

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out loss is taken after `step` steps."""
        return step == self.steps or step % max(1, self.steps // self.evaluations) == 0


class Point(BaseModel):
    """A loss in nats per token, after so many steps."""

    model_config = ConfigDict(frozen=True)

    step: int
    loss: float


class TrainingReport(BaseModel):
    """What a run did.

    Attributes:
        model: its name.
        parameters: learned numbers.
        reduced_from: parameters of the design when a smaller one was trained in its place.
        steps: done in all, those before a resume included; fewer than planned when it was stopped.
        resumed_from: the step a checkpoint continued from.
        device, precision, processes: where it ran.
        tokens_per_step: tokens predicted in one step, over all processes.
        data: file, kind, tokens for training and held out.
        losses: of each training step (of about a thousand, when there are more), auxiliary losses included.
        held_out: without auxiliary losses.
        bits_per_byte: of the last held-out loss; None where a token is not a byte.
        tokens_per_second: in the steps of this run, evaluation and checkpoints left out; the first step is left out as well
            when there are others.
        peak_memory_bytes: high-water mark of the process (of the device's allocator on a card); None where nobody says.
        checkpoint: the last one written, or None.
        notes: what a reader must know.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    parameters: int
    reduced_from: int | None
    steps: int
    resumed_from: int | None
    device: str
    precision: str
    processes: int
    tokens_per_step: int
    data: dict[str, str | int]
    losses: tuple[Point, ...]
    held_out: tuple[Point, ...]
    bits_per_byte: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    checkpoint: str | None
    notes: tuple[str, ...]
