"""RMS normalisation: residual, gate before and after, groups, odd widths."""

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.norm import rms_norm, triton_norm


def _inputs(rows, width, **with_):
    torch.manual_seed(0)
    made = {
        name: torch.randn(*rows, width).double() for name in ("x", "residual", "gate") if with_.get(name, name == "x")
    }
    return {**made, "weight": torch.randn(width).double()} if with_.get("weight", True) else {**made, "weight": None}


def _call(**options):
    return lambda backend, x, weight, **given: rms_norm(x, weight, 1e-6, backend=backend, **given, **options)


AGREEMENTS = [
    Agreement(name="plain", inputs=lambda: _inputs((3, 7), 60), call=_call(), gradients=("x", "weight")),
    Agreement(
        name="residual",
        inputs=lambda: _inputs((5,), 200, residual=True),
        call=_call(unit_offset=True),
        gradients=("x", "weight", "residual"),
    ),
    Agreement(
        name="gate-first-grouped",
        inputs=lambda: _inputs((9,), 96, gate=True),
        call=_call(group_size=24),
        gradients=("x", "weight", "gate"),
    ),
    Agreement(
        name="gate-last-sigmoid",
        inputs=lambda: _inputs((2, 9), 100, gate=True, residual=True),
        call=_call(gate_first=False, gate_activation="sigmoid"),
        gradients=("x", "weight", "gate", "residual"),
    ),
    Agreement(  # a program of the backward pass goes on to further rows
        name="more-rows-than-programs",
        inputs=lambda: _inputs((2200,), 12),
        call=_call(),
        gradients=("x", "weight"),
    ),
    Agreement(name="no-weight", inputs=lambda: _inputs((33,), 16, weight=False), call=_call(), gradients=("x",)),
]


def _forward(width, group, gate=True, residual=True):
    def launch(meta):
        x = meta(4096, width)
        triton_norm.forward(
            x, meta(width), x if residual else None, x if gate else None, 1e-6, True, False, group, False
        )

    return launch


def _backward(width, group):
    def launch(meta):
        x, rstd = meta(4096, width), meta(4096, width // group, dtype=torch.float32)
        triton_norm.backward(x, x, x, meta(width), x, rstd, True, False, group, False)

    return launch


COMPILATIONS = [
    *(
        Compilation(name=f"forward-{n}", launch=_forward(n, n), short=n == 4096)
        for n in (128, 512, 2048, 4096, 16384, 32768)
    ),
    *(
        # Five rows of 16384 and more do not fit the registers of a block; nothing is recomputed to save them.
        Compilation(
            name=f"backward-{n}",
            launch=_backward(n, n),
            spill_bytes={"_rms_norm_backward_kernel": {16384: 448, 32768: 1700}.get(n, 0)},
            short=n == 4096,
        )
        for n in (128, 512, 2048, 4096, 16384, 32768)
    ),
    Compilation(name="forward-grouped", launch=_forward(4096, 512)),
    Compilation(name="forward-plain-odd", launch=_forward(4100, 4100, gate=False, residual=False), short=False),
]


def _training(meta, batch, time):
    x, weight, rstd = meta(batch * time, 4096), meta(4096), meta(batch * time, 1, dtype=torch.float32)
    triton_norm.forward(x, weight, x, None, 1e-6, True, False, 4096, False)
    triton_norm.backward(x, x, x, weight, None, rstd, True, False, 4096, False)


FIRST_CALLS = [FirstCall(name="residual-4096", launch=_training)]
