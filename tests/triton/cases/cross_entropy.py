"""Loss of a linear head: several blocks of the vocabulary, several chunks of tokens, ignored targets."""

import torch
from support.cases import Agreement, Compilation

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
    _agreement("mean", (13, 24, 1500), chunk=5),
    _agreement("sum-soft-cap-scale", (7, 16, 100), reduction="sum", soft_cap=2.0, scale=0.7),
    _agreement("none", (9, 16, 75), reduction="none", chunk=4),
]


def _launch(vocab, soft_cap=None):
    def launch(meta):
        logits, targets, share = meta(512, vocab), meta(512, dtype=torch.int64), meta(512, dtype=torch.float32)
        triton_loss.loss_and_slope(logits, targets, share, -100, soft_cap, 1.0)

    return launch


COMPILATIONS = [
    Compilation(name="vocabulary-128k", launch=_launch(128256)),
    Compilation(name="vocabulary-32k", launch=_launch(32000), short=False),
    Compilation(name="vocabulary-256k-soft-cap", launch=_launch(256000, 30.0), short=False),
]
