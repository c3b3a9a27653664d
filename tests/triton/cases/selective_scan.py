"""The selective scan: inference (skip and gate fused), segments, training, packed sequences, single steps."""

from functools import partial

import torch
from support.cases import Agreement, Compilation, FirstCall
from torch.nn.functional import softplus

from archcompass.kernels.selective_scan import selective_scan, selective_scan_step, triton_scan


def _normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _inputs(batch, time, channels, entries, sequences=None, gated=True):
    return {
        "x": _normal(batch, time, channels),
        "dt": softplus(_normal(batch, time, channels)),
        "A": -_normal(channels, entries).exp(),
        "B": _normal(batch, time, entries),
        "C": _normal(batch, time, entries),
        "D": _normal(channels) if gated else None,
        "gate": _normal(batch, time, channels) if gated else None,
        "initial_state": _normal(sequences or batch, channels, entries),
    }


def _call(bounds=None):
    def run(backend, **inputs):
        return selective_scan(**inputs, cu_seqlens=None if bounds is None else torch.tensor(bounds), backend=backend)

    return run


def _step(backend, initial_state, **inputs):
    if backend == "reference":
        return selective_scan(**inputs, initial_state=initial_state, backend=backend)
    now = {name: x[:, 0] if name in {"x", "dt", "B", "C", "gate"} else x for name, x in inputs.items()}
    with torch.no_grad():
        y, state = selective_scan_step(**now, state=initial_state.clone(), backend=backend)
    return y.unsqueeze(1), state


BOUNDS = [0, 0, 1, 36, 36, 50]
PRECISE = ("A", "D", "initial_state")
ALL = ("x", "dt", "A", "B", "C", "D", "gate", "initial_state")

AGREEMENTS = [
    Agreement(name="inference", inputs=partial(_inputs, 1, 35, 10, 5), call=_call(), float32=PRECISE),
    Agreement(
        name="segments",
        inputs=partial(_inputs, 1, 260, 8, 16),
        call=_call(),
        float32=PRECISE,
        dtypes=(torch.float32,),
    ),
    Agreement(
        name="segments-training",
        inputs=partial(_inputs, 1, 258, 5, 3),
        call=_call(),
        float32=PRECISE,
        gradients=ALL,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Agreement(name="training", inputs=partial(_inputs, 2, 33, 5, 3), call=_call(), float32=PRECISE, gradients=ALL),
    Agreement(
        name="training-plain",
        inputs=partial(_inputs, 1, 20, 20, 16, gated=False),
        call=_call(),
        float32=PRECISE,
        gradients=tuple(name for name in ALL if name not in {"D", "gate"}),
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Agreement(
        name="packed",
        inputs=partial(_inputs, 1, 50, 4, 4, 5),
        call=_call(BOUNDS),
        float32=PRECISE,
        dtypes=(torch.float32,),
    ),
    Agreement(
        name="packed-training",
        inputs=partial(_inputs, 1, 50, 4, 4, 5),
        call=_call(BOUNDS),
        float32=PRECISE,
        gradients=ALL,
        dtypes=(torch.float32,),
    ),
    Agreement(name="step", inputs=partial(_inputs, 3, 1, 40, 16), call=_step, float32=PRECISE),
]


def _forward(entries, channels=1536, tokens=4096, segments=1, batch=2):
    def launch(meta):
        x, B = meta(tokens, channels), meta(tokens, entries)
        A, first = meta(channels, entries, dtype=torch.float32), meta(batch, channels, entries, dtype=torch.float32)
        bounds = meta(batch * segments + 1, dtype=torch.int64)
        triton_scan.scan(x, x, A, B, B, meta(channels), x, first, bounds, None, 0, segments, torch.bfloat16)

    return launch


def _training(entries, channels=1536, tokens=4096, segments=4, batch=2):
    def launch(meta):
        x, B, y = meta(tokens, channels), meta(tokens, entries), meta(tokens, channels, dtype=torch.float32)
        A, first = meta(channels, entries, dtype=torch.float32), meta(batch, channels, entries, dtype=torch.float32)
        bounds, slots = meta(batch * segments + 1, dtype=torch.int64), meta(batch * segments + 1, dtype=torch.int32)
        table = (first, bounds, slots, 128, segments)
        _, last, kept = triton_scan.scan(x, x, A, B, B, None, None, *table, torch.float32)
        triton_scan.scan_backward(x, x, A, B, B, bounds, kept, slots, y, last, segments)

    return launch


def _decode(entries, channels=1536):
    def launch(meta):
        x, B, A = meta(8, channels), meta(8, entries), meta(channels, entries, dtype=torch.float32)
        state = meta(8, channels, entries, dtype=torch.float32)
        triton_scan.selective_scan_step_op._init_fn(x, x, A, B, B, meta(channels), x, state)

    return launch


COMPILATIONS = [
    *(
        Compilation(
            name=f"forward-n{n}",
            launch=_forward(n, segments=4),
            spill_bytes={"_scan_kernel@100": 8} if n == 256 else {},
            short=n == 16,
        )
        for n in (16, 64, 256)
    ),
    *(Compilation(name=f"training-n{n}", launch=_training(n), short=n == 16) for n in (16, 64, 256)),
    *(Compilation(name=f"step-n{n}", launch=_decode(n), short=n == 16) for n in (16, 64, 256)),
]


def _prompt_and_training(meta, batch, time):
    _forward(16, tokens=batch * time, batch=batch)(meta)
    _training(16, tokens=batch * time, batch=batch)(meta)


# Inference; and for training what a segment adds, and the states it keeps.
FIRST_CALLS = [FirstCall(name="n16", launch=_prompt_and_training, most={"_scan_kernel": 3})]
