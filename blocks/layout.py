"""How the matrices of a model lie in memory, for single tokens on a CPU: by columns, in large pages.

Names, shapes and values stay; only strides change. Why that is faster: `kernels/linear.py` and `kernels/pages.py`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from archcompass.blocks.runtime import BlockModule, Linear
from archcompass.kernels.linear import BY_COLUMNS, together

SMALLEST_SIDE = 32  # of experts, low ranks and tables, which are told from taps and decays by it


@torch.no_grad()
def lay_by_columns(module: nn.Module, besides: Iterable[Tensor] = ()) -> None:
    """Lays the float32 and bfloat16 matrices on the CPU that tokens are multiplied by, in place, but for those `besides`.

    Takes the memory of one matrix more while it runs; what was mapped from a file becomes memory of its own.
    """
    stay = set(besides)
    for dtype in BY_COLUMNS:
        found = [p for p in _matrices(module) if p.is_cpu and p.dtype is dtype and p not in stay]
        for matrix, laid in zip(found, together(found), strict=True):
            matrix.data = laid


def _matrices(module: nn.Module) -> dict[Tensor, None]:
    """Each once: those first and in order that a block reads together, then experts and tables, then every other layer's."""
    blocks = [child for child in module.modules() if isinstance(child, BlockModule)]
    groups = [group for block in blocks for group in block.read_together()]
    grouped = [layer.weight for group in groups for layer in group if type(layer) is Linear]
    large = [p for p in module.parameters() if p.ndim > 1 and min(p.shape[-2:]) >= SMALLEST_SIDE]
    rest = [child.weight for child in module.modules() if isinstance(child, Linear)]
    return dict.fromkeys([*grouped, *large, *rest])
