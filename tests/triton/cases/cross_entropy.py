"""Loss of a linear head: several tiles and chunks of the vocabulary, ignored targets, odd widths."""

from unittest.mock import patch

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.cross_entropy import linear_cross_entropy, triton_loss


def _inputs(tokens, width, vocab):
    torch.manual_seed(0)
    targets = torch.randint(0, vocab, (tokens,))
    targets[1::4] = -100
    return {
        "hidden": torch.randn(tokens, width).double(),
        "weight": 0.3 * torch.randn(vocab, width).double(),
        "targets": targets,
    }


def _agreement(name, shape, **options):
    return Agreement(
        name=name,
        inputs=lambda: _inputs(*shape),
        call=lambda backend, **given: linear_cross_entropy(**given, backend=backend, **options),
        gradients=("hidden", "weight"),
    )


AGREEMENTS = [
    _agreement("mean-three-chunks-of-words", (75, 60, 1500), chunk=25),
    _agreement("sum-soft-cap-scale", (7, 16, 100), reduction="sum", soft_cap=2.0, scale=0.7),
    _agreement("none", (9, 16, 75), reduction="none"),
    Agreement(
        name="several-tiles-of-words-in-a-program",
        inputs=lambda: _inputs(9, 16, 500),
        call=lambda backend, **given: _on_a_small_gpu(backend, given),
        gradients=("hidden", "weight"),
    ),
]


def _on_a_small_gpu(backend, given):
    """A program takes several tiles, as it does where the vocabulary has more of them than the GPU has programs."""
    with patch.object(triton_loss, "PROGRAMS_WANTED", 2):
        return linear_cross_entropy(**given, backend=backend, soft_cap=4.0)


def _launch(width, vocab, soft_cap=None, dtype=torch.bfloat16, tokens=512):
    def launch(meta):
        hidden, weight = meta(tokens, width, dtype=dtype), meta(vocab, width, dtype=dtype)
        targets, sums = meta(tokens, dtype=torch.int64), meta(tokens, dtype=torch.float32)
        triton_loss.forward(hidden, weight, targets, -100, soft_cap, 1.0)
        triton_loss.backward(sums, hidden, weight, targets, sums, -100, soft_cap, 1.0, vocab)

    return launch


DOTS = frozenset({"_loss_forward_kernel", "_loss_slope_kernel"})

COMPILATIONS = [
    Compilation(name="4096-to-128k", launch=_launch(4096, 128256), dots=DOTS),
    Compilation(name="2304-to-256k-soft-cap", launch=_launch(2304, 256000, 30.0), dots=DOTS, short=False),
    Compilation(name="60-to-75-float32", launch=_launch(60, 75, dtype=torch.float32), dots=DOTS, short=False),
    Compilation(
        name="4096-to-32k-float32",
        launch=_launch(4096, 32000, dtype=torch.float32),
        dots=DOTS,
        spill_bytes={"_loss_forward_kernel": 8},
        short=False,
    ),
]


FIRST_CALLS = [
    FirstCall(name="4096-to-128k", launch=lambda meta, batch, time: _launch(4096, 128256, tokens=batch * time)(meta))
]
