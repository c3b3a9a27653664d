"""The diagonal recurrence: one sequence in segments, several at once, rows that share a decay, gradients, one token."""

from functools import partial

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.diagonal_scan import diagonal_scan, triton_scan


def _inputs(batch, time, channels, rows=(), strength=1.0):
    return {
        "log_decay": -strength * torch.rand(batch, time, channels, dtype=torch.float64),
        "inputs": torch.randn(batch, time, *rows, channels, dtype=torch.float64),
        "initial_state": torch.randn(batch, *rows, channels, dtype=torch.float64),
    }


def _call(backend, **inputs):
    return diagonal_scan(**inputs, backend=backend)


ALL = ("log_decay", "inputs", "initial_state")

AGREEMENTS = [
    Agreement(name="sequences", inputs=partial(_inputs, 3, 20, 70), call=_call, float32=("initial_state",)),
    Agreement(name="segments", inputs=partial(_inputs, 1, 201, 5), call=_call, float32=("initial_state",)),
    Agreement(
        name="training",
        inputs=partial(_inputs, 2, 33, 7, (2,)),
        call=_call,
        float32=("initial_state",),
        gradients=ALL,
    ),
    Agreement(
        name="training-segments",
        inputs=partial(_inputs, 1, 140, 3, strength=0.05),
        call=_call,
        gradients=ALL,
        dtypes=(torch.float32,),
    ),
    Agreement(name="strong-decay", inputs=partial(_inputs, 1, 30, 9, strength=300.0), call=_call, gradients=ALL),
    Agreement(name="step", inputs=partial(_inputs, 3, 1, 40, (2,)), call=_call, float32=("initial_state",)),
]


def _forward(rows, segments, channels=2560, tokens=2048):
    def launch(meta):
        decay = meta(1, tokens, channels, dtype=torch.float32)
        inputs = meta(1, tokens, rows, channels, dtype=torch.float32)
        triton_scan.scan(decay, inputs, meta(1, rows, channels, dtype=torch.float32), segments)

    return launch


COMPILATIONS = [
    Compilation(name="segments", launch=_forward(1, 16)),
    Compilation(name="rows", launch=_forward(2, 1), short=False),
]


# With outputs, and (where time is cut) only the last state of a segment.
FIRST_CALLS = [
    FirstCall(
        name="2560",
        launch=lambda meta, batch, time: _forward(1, 1 + time // 1024, tokens=batch * time)(meta),
        most={"_diagonal_kernel": 2},
    )
]
