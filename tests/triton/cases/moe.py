"""Experts: gates and none, biases, weights on the input, a prime number of experts, some of them idle."""

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.moe import moe_mlp, triton_moe
from archcompass.kernels.moe.activations import Activation, Experts

WANTED = ("x", "weights", "gate_up", "down")


def _inputs(tokens, experts, top_k, hidden, inner, gated=True, bias=False):
    torch.manual_seed(0)
    rows = 2 * inner if gated else inner
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    if experts > top_k:
        chosen = torch.where(chosen == 0, experts - 1, chosen)  # expert 0 is idle
        chosen = chosen.sort(dim=-1).values
    made = {
        "x": torch.randn(tokens, hidden).double(),
        "weights": torch.rand(tokens, top_k).double(),
        "experts": chosen,
        "gate_up": 0.2 * torch.randn(experts, rows, hidden).double(),
        "down": 0.2 * torch.randn(experts, hidden, inner).double(),
    }
    if bias:
        made |= {
            "gate_up_bias": torch.randn(experts, rows).double(),
            "down_bias": torch.randn(experts, hidden).double(),
        }
    return made


def _agreement(name, shape, gated=True, bias=False, **options):
    return Agreement(
        name=name,
        inputs=lambda: _inputs(*shape, gated=gated, bias=bias),
        call=lambda backend, **given: moe_mlp(**given, gated=gated, backend=backend, **options),
        gradients=(*WANTED, *(("gate_up_bias", "down_bias") if bias else ())),
    )


AGREEMENTS = [
    _agreement("silu", (19, 7, 3, 36, 20)),
    _agreement("one-token", (1, 7, 2, 48, 20)),
    _agreement("every-expert", (5, 3, 3, 17, 9)),
    _agreement("gpt-oss", (11, 5, 2, 24, 20), bias=True, activation="swish", alpha=1.702, limit=0.5, up_offset=1.0),
    _agreement("relu2-without-gate", (11, 5, 2, 24, 20), gated=False, activation="relu2"),
    _agreement("gelu-weights-on-input", (11, 5, 2, 24, 20), bias=True, activation="gelu", scale_input=True),
    _agreement("gelu-tanh", (9, 5, 1, 16, 16), activation="gelu_tanh"),
]

SILU = Activation("silu", True)


def _tensors(meta, tokens, experts, top_k, hidden, inner, dtype=torch.bfloat16):
    return (
        meta(tokens, hidden, dtype=dtype),
        meta(tokens, top_k, dtype=dtype),
        meta(tokens, top_k, dtype=torch.int64),
        meta(experts, 2 * inner, hidden, dtype=dtype),
        meta(experts, hidden, inner, dtype=dtype),
    )


def _forward(*shape, **kind):
    def launch(meta):
        x, weights, chosen, *matrices = _tensors(meta, *shape, **kind)
        triton_moe.forward(x, weights, chosen, Experts(*matrices, None, None, SILU, False))

    return launch


def _backward(*shape, **kind):
    def launch(meta):
        x, weights, chosen, *matrices = _tensors(meta, *shape, **kind)
        triton_moe.backward(x, x, weights, chosen, Experts(*matrices, None, None, SILU, False))

    return launch


ROWS, BOTH = frozenset({"_grouped_rows_kernel"}), frozenset({"_grouped_rows_kernel", "_grouped_weights_kernel"})

COMPILATIONS = [
    Compilation(name="forward-many-rows", launch=_forward(16384, 128, 8, 2048, 768), dots=ROWS),
    Compilation(name="forward-some-rows", launch=_forward(512, 128, 8, 2048, 768), dots=ROWS, short=False),
    Compilation(
        name="forward-few-rows",
        launch=_forward(16, 128, 8, 2048, 768),
        dots=ROWS,
        short=False,
        spill_bytes={"_grouped_rows_kernel@80": 8},
    ),
    Compilation(
        name="forward-float32",
        launch=_forward(4096, 8, 2, 1024, 512, dtype=torch.float32),
        dots=ROWS,
        short=False,
        spill_bytes={"_grouped_rows_kernel@120": 16},
    ),
    Compilation(name="backward", launch=_backward(16384, 128, 8, 2048, 768), dots=BOTH),
    Compilation(
        name="backward-float32",
        launch=_backward(4096, 8, 2, 1024, 512, dtype=torch.float32),
        dots=BOTH,
        short=False,
        spill_bytes={"_grouped_rows_kernel@120": 16},
    ),
]


def _training(meta, batch, time):
    shape = (batch * time, 128, 8, 2048, 768)
    _forward(*shape)(meta)
    _backward(*shape)(meta)


# Few, some and many rows an expert, times five products; the gradients of two weights.
MOE = {"_grouped_rows_kernel": 15, "_grouped_weights_kernel": 2}

FIRST_CALLS = [FirstCall(name="128-choose-8", launch=_training, most=MOE)]
