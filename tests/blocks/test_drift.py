"""Rounding does not pile up: 4096 single steps in float32 end where one forward in float64 does."""

import pytest
import torch

from archcompass.blocks.base import TINY_WIDTH, Block, known_blocks
from archcompass.blocks.runtime import Context, initialise

STEPS = 4096

RECURRENT = [
    pytest.param(block.tiny()[0], id=kind)
    for kind, block in known_blocks().items()
    if (traits := block.tiny()[0].traits).role == "mixer" and traits.bounded_state and traits.window is None
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", RECURRENT)
def test_a_state_is_right_after_thousands_of_steps(spec: Block) -> None:
    torch.manual_seed(0)
    module = spec.build(TINY_WIDTH).eval()
    initialise(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, state, outputs = torch.randn(1, STEPS, TINY_WIDTH), None, []
    with torch.inference_mode():
        for past in range(STEPS):
            token = x[:, past : past + 1]
            y, state = module(token, state, Context(past=past, embeddings=token))
            outputs.append(y)
        exact = module.double()(x.double(), None, Context(embeddings=x.double()))[0]
    drift = (torch.cat(outputs, dim=1) - exact).abs().amax(dim=(0, 2))
    assert (drift / exact.std() < 1e-3).all(), f"worst at step {int(drift.argmax())}: {float(drift.max()):.1e}"
