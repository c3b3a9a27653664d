"""Rotary embedding: both pairings, part of a head, a table per row."""

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.rope import rotate, triton_rope


def _inputs(batch, time, heads, width, half, table_batch=None):
    torch.manual_seed(0)
    angle = torch.randn(*((time, half) if table_batch is None else (table_batch, time, half))).double()
    return {"x": torch.randn(batch, time, heads, width).double(), "cos": angle.cos(), "sin": angle.sin()}


def _agreement(name, shape, **options):
    return Agreement(
        name=name,
        inputs=lambda: _inputs(*shape),
        call=lambda backend, x, cos, sin: rotate(x, cos, sin, backend=backend, **options),
        float32=("cos", "sin"),
        gradients=("x",),
    )


AGREEMENTS = [
    _agreement("halves", (2, 5, 3, 12, 6)),
    _agreement("halves-partial-table-per-row", (2, 5, 17, 20, 5, 2)),
    _agreement("interleaved-partial", (1, 7, 2, 136, 30), interleaved=True),
]


def _launch(heads, width, half, interleaved=False):
    def launch(meta):
        table = meta(2048, half, dtype=torch.float32)
        triton_rope.launch(meta(2, 2048, heads, width), table, table, interleaved, False)

    return launch


COMPILATIONS = [
    Compilation(name="halves-128", launch=_launch(32, 128, 64)),
    Compilation(name="interleaved-64-of-192", launch=_launch(128, 192, 32, interleaved=True), short=False),
]


def _prompt(meta, batch, time):
    table = meta(time, 64, dtype=torch.float32)
    triton_rope.launch(meta(batch, time, 32, 128), table, table, False, False)


FIRST_CALLS = [FirstCall(name="halves-128", launch=_prompt)]
