"""Parallel blocks at work."""

from torch import Tensor, nn

from archcompass.blocks.base import Block
from archcompass.blocks.parallel.spec import Parallel
from archcompass.blocks.runtime import BlockModule, BlockState, CompoundState, Context, part_of


class ParallelModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]; the state holds that of every branch."""

    spec: Parallel

    def __init__(self, spec: Parallel, width: int, layer: int) -> None:
        super().__init__(spec, width)
        self.branches = nn.ModuleDict({name: branch.build(width, layer) for name, branch in spec.branches.items()})
        norm = spec.branch_norm
        self.norms = None if norm is None else nn.ModuleDict({name: norm.build(width) for name in spec.branches})

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        total, states = None, {}
        for name, branch in self.branches.items():
            y, states[name] = branch(x, part_of(state, name), context)
            y = y if self.norms is None else self.norms[name](y)[0]
            total = y if total is None else total + y
        assert total is not None
        y = total if self.spec.multiplier == 1.0 else total * self.spec.multiplier
        kept = any(part is not None for part in states.values())
        return y, CompoundState(states) if kept else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of parallel blocks."""
    assert isinstance(spec, Parallel)
    return ParallelModule(spec, width, layer)
