"""Every block learns on a machine where Triton was never installed, as on macOS and Windows."""

import subprocess
import sys

PROGRAM = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else real(name, *rest)
sys.modules["triton"] = None  # whoever imports it is told that there is none
import torch
from archcompass.blocks.base import TINY_WIDTH, known_blocks
from archcompass.blocks.runtime import Context, initialise
for block in known_blocks().values():
    for spec in block.tiny():
        if spec.traits.role not in ("mixer", "channel"):
            continue
        module = spec.build(TINY_WIDTH)
        initialise(module)
        x = torch.randn(2, 9, TINY_WIDTH, requires_grad=True)
        module(x, None, Context(embeddings=x))[0].sum().backward()
        assert x.grad.isfinite().all(), spec
print("done")
"""


def test_every_block_learns_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]
