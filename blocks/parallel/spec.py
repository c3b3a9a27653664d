"""Parallel mixers: y = multiplier · Σ_i norm_i(block_i(x)).

Falcon-H1 (arXiv 2507.22448) sums attention and Mamba-2, each with its own constants on input and output; Hymba (arXiv
2411.13676) norms each output, whose weights say how much it counts, and takes the mean.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from archcompass.blocks.base import (
    AnyBlock,
    Block,
    Live,
    Op,
    Parameters,
    StateTensor,
    Step,
    Traits,
    pointwise,
)
from archcompass.errors import SpecError


class Parallel(Block):
    """Blocks side by side.

    Attributes:
        branches: the blocks by name; at least two.
        branch_norm: a norm on each output before the sum, or None.
        multiplier: on the sum.
    """

    label = "parallel blocks"
    kind: Literal["parallel"] = "parallel"
    branches: dict[str, AnyBlock] = Field(min_length=2)
    branch_norm: AnyBlock | None = None
    multiplier: float = 1.0

    @model_validator(mode="after")
    def _branches_are_sublayers(self) -> Self:
        for name, branch in self.branches.items():
            if branch.traits.role not in ("mixer", "channel"):
                raise SpecError(f"branches.{name} is a {branch.traits.role}; branches are mixers or channel blocks")
            if "." in name or not name:
                raise SpecError(f"branches has a name {name!r}; names are words without a dot")
        if self.branch_norm is not None and self.branch_norm.traits.role != "norm":
            raise SpecError(f"branch_norm is a {self.branch_norm.traits.role}; it must be a norm, such as rms_norm")
        return self

    def check(self, width: int) -> None:
        for branch in self.branches.values():
            branch.check(width)

    @property
    def traits(self) -> Traits:
        parts = [branch.traits for branch in self.branches.values()]
        windows = [part.window for part in parts if part.mixes_time]
        return Traits(
            role="mixer" if any(part.role == "mixer" for part in parts) else "channel",
            mixes_time=any(part.mixes_time for part in parts),
            bounded_state=all(part.bounded_state for part in parts),
            exact_recall=any(part.exact_recall for part in parts),
            window=max((window for window in windows if window), default=None) if all(windows) else None,
            subquadratic=all(part.subquadratic for part in parts),
            sparse_activation=any(part.sparse_activation for part in parts),
        )

    def parameters(self, width: int) -> Parameters:
        total = Parameters()
        for branch in self.branches.values():
            total = total + branch.parameters(width)
        return total if self.branch_norm is None else total + self.branch_norm.parameters(width) * len(self.branches)

    def state(self, width: int, context: int) -> list[StateTensor]:
        return [
            StateTensor(name=f"{name}.{tensor.name}", shape=tensor.shape, dtype=tensor.dtype, grows=tensor.grows)
            for name, branch in self.branches.items()
            for tensor in branch.state(width, context)
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        operations = [
            op._replace(name=f"{name}: {op.name}")
            for name, branch in self.branches.items()
            for op in branch.work(width, step)
        ]
        if self.branch_norm is not None:
            operations += [op.times(len(self.branches)) for op in self.branch_norm.work(width, step)]
        return [*operations, pointwise(step, "sum of branches", step.tokens * width, reads=len(self.branches))]

    def live(self, width: int, step: Step) -> Live:
        parts = [branch.live(width, step) for branch in self.branches.values()]
        outputs = len(parts) * step.tokens * width * step.element_bytes
        return Live(
            peak_bytes=outputs + max(part.peak_bytes for part in parts),
            saved_bytes=sum(part.saved_bytes for part in parts) + outputs * step.training,
            backward_bytes=outputs * step.training + max(part.backward_bytes for part in parts),
        )

    def share(self, cards: int) -> Self:
        return self.model_copy(update={"branches": {name: one.share(cards) for name, one in self.branches.items()}})

    @classmethod
    def tiny(cls) -> list[Self]:
        attention = {"kind": "attention", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        mamba = {"kind": "mamba2", "num_heads": 4, "head_dim": 8, "state_size": 8}
        window = attention | {"sliding_window": 6}
        options: list[dict[str, object]] = [
            {"branches": {"attention": attention, "mamba": mamba}},
            {"branches": {"a": window, "m": mamba}, "branch_norm": {"kind": "rms_norm"}, "multiplier": 0.5},
        ]
        return [cls.model_validate(option) for option in options]
