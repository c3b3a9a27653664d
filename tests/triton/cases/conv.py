"""Causal depthwise convolution: widths, state, packed sequences shorter than the filter."""

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.conv import causal_conv, triton_conv


def _inputs(batch=1, time=75, channels=20, width=4, bias=True, sequences=None):
    return {
        "x": torch.randn(batch, time, channels).double(),
        "weight": torch.randn(channels, width).double(),
        "bias": torch.randn(channels).double() if bias else None,
        "state": torch.randn(sequences or batch, width - 1, channels).double(),
    }


def _call(activation, cu=None):
    def call(backend, x, weight, bias, state):
        packed = None if cu is None else torch.tensor(cu)
        return causal_conv(
            x, weight, bias, activation=activation, initial_state=state, cu_seqlens=packed, backend=backend
        )

    return call


PACK = [0, 1, 1, 3, 12]

AGREEMENTS = [
    Agreement(
        name="silu",
        inputs=lambda: _inputs(batch=2, time=40),
        call=_call("silu"),
        gradients=("x", "weight", "bias", "state"),
    ),
    Agreement(
        name="plain-width-3",
        inputs=lambda: _inputs(width=3, bias=False, time=33, channels=70),
        call=_call(None),
        gradients=("x", "weight", "state"),
    ),
    Agreement(
        name="packed",
        inputs=lambda: _inputs(time=12, sequences=4),
        call=_call("silu", PACK),
        gradients=("x", "weight", "bias", "state"),
    ),
    Agreement(name="one-token", inputs=lambda: _inputs(batch=3, time=1), call=_call("silu"), gradients=("x", "state")),
]


def _launch(time, channels, width, gradients=False, packed=False, dtype=torch.bfloat16):
    def launch(meta):
        batch = 1 if packed else 2
        x, weight, bias = meta(batch, time, channels, dtype=dtype), meta(channels, width), meta(channels)
        before = meta(5 if packed else batch, width - 1, channels, dtype=dtype)
        cu = meta(6, dtype=torch.int32) if packed else None
        if gradients:
            triton_conv.backward(x, x, before, weight, bias, cu, True)
        else:
            triton_conv.forward(x, before, weight, bias, cu, True)

    return launch


COMPILATIONS = [
    Compilation(name="forward", launch=_launch(4096, 5376, 4)),
    Compilation(name="backward", launch=_launch(4096, 5376, 4, gradients=True)),
    Compilation(name="forward-packed", launch=_launch(4096, 5376, 4, packed=True), short=False),
    Compilation(name="backward-packed", launch=_launch(4096, 5376, 4, packed=True, gradients=True), short=False),
    Compilation(name="forward-float32-odd", launch=_launch(4096, 5377, 3, dtype=torch.float32), short=False),
    Compilation(name="step", launch=_launch(1, 5376, 4), short=False),
]


def _training(meta, batch, time):
    x, weight, bias, before = meta(batch, time, 5376), meta(5376, 4), meta(5376), meta(batch, 3, 5376)
    triton_conv.forward(x, before, weight, bias, None, True)
    triton_conv.backward(x, x, before, weight, bias, None, True)


# The backward pass runs the forward kernel for the sum before the activation.
FIRST_CALLS = [FirstCall(name="silu", launch=_training, most={"_conv_forward_kernel": 2})]
