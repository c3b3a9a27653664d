"""The delta rule and DPLR: inference (fused) and training (torch around the state pass), batches and packed sequences."""

from functools import partial

import torch
from support.cases import ALL_DTYPES, Agreement, Compilation, FirstCall
from torch.nn.functional import normalize

from archcompass.kernels.delta_rule import (
    delta_rule,
    delta_rule_step,
    dplr,
    dplr_step,
    triton_op,
    triton_passes,
    triton_step,
)

SHAPE = {"batch": 1, "time": 75, "key_heads": 1, "heads": 2, "key_dim": 60, "value_dim": 100}
VECTOR = {"batch": 1, "time": 40, "key_heads": 1, "heads": 2, "key_dim": 20, "value_dim": 24}


def _normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _delta_inputs(decay, *, batch, time, key_heads, heads, key_dim, value_dim, sequences=None, strength=1.0):
    keys = (batch, time, key_heads, key_dim)
    gates = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}[decay]
    return {
        "q": normalize(_normal(*keys), dim=-1),
        "k": normalize(_normal(*keys), dim=-1),
        "v": _normal(batch, time, heads, value_dim),
        "beta": 2 * torch.rand(batch, time, heads).double(),
        "log_decay": None if gates is None else -strength * torch.rand(*gates).double(),
        "initial_state": _normal(sequences or batch, heads, key_dim, value_dim),
    }


def _dplr_inputs(*, batch, time, heads, key_dim, value_dim, sequences=None, strength=0.6):
    keys = (batch, time, heads, key_dim)
    removal = normalize(_normal(*keys), dim=-1)
    return {
        "q": _normal(*keys),
        "k": 0.3 * _normal(*keys),
        "v": _normal(batch, time, heads, value_dim),
        "a": -removal,
        "b": removal * torch.rand(*keys).double(),
        "log_decay": -strength * torch.rand(*keys).double(),
        "initial_state": _normal(sequences or batch, heads, key_dim, value_dim),
    }


def _call(operation, bounds=None, chunk_size=32):
    def run(backend, **inputs):
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        out, state = operation(**inputs, cu_seqlens=cu_seqlens, scale=0.5, chunk_size=chunk_size, backend=backend)
        # On a CPU torch multiplies float16 in float32, so only what is stored in float16 compares with a GPU's products.
        return out, state.half() if out.dtype == torch.float16 else state

    return run


def _step(operation, full):
    """The step kernel, under the name of the whole operation's backends."""

    def run(backend, initial_state, **inputs):
        now = {name: None if x is None else x[:, 0] for name, x in inputs.items()}
        if backend == "reference":
            return full(**inputs, initial_state=initial_state, scale=0.5, backend=backend)
        with torch.no_grad():
            out, state = operation(**now, state=initial_state.clone(), scale=0.5, backend=backend)
        return out.unsqueeze(1), state

    return run


DELTA = ("q", "k", "v", "beta", "log_decay", "initial_state")
DPLR = ("q", "k", "v", "a", "b", "log_decay", "initial_state")
PRECISE = ("beta", "log_decay", "initial_state")
SMALL = {"batch": 2, "time": 35, "key_heads": 1, "heads": 2, "key_dim": 20, "value_dim": 24}
SMALL_DPLR = {"batch": 2, "time": 35, "heads": 1, "key_dim": 20, "value_dim": 24}
PACKED = {"batch": 1, "time": 50, "key_heads": 1, "heads": 2, "key_dim": 16, "value_dim": 16, "sequences": 5}
BOUNDS = [0, 0, 1, 20, 20, 50]

AGREEMENTS = [
    *(
        Agreement(
            name=f"{decay}-inference",
            inputs=partial(_delta_inputs, decay, **VECTOR if decay == "vector" else SHAPE),
            call=_call(delta_rule, chunk_size=64 if decay == "scalar" else 32),
            float32=PRECISE,
        )
        for decay in ("scalar", "vector")
    ),
    *(
        Agreement(
            name=f"{decay}-training",
            inputs=partial(_delta_inputs, decay, **SMALL),
            call=_call(delta_rule, chunk_size=16),
            float32=PRECISE,
            gradients=DELTA,
            dtypes=ALL_DTYPES if decay == "scalar" else (torch.float32, torch.bfloat16),
        )
        for decay in ("none", "scalar", "vector")
    ),
    Agreement(
        name="packed-inference",
        inputs=partial(_delta_inputs, "none", **PACKED),
        call=_call(delta_rule, BOUNDS, 16),
        float32=PRECISE,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Agreement(
        name="packed-training",
        inputs=partial(_delta_inputs, "scalar", **PACKED),
        call=_call(delta_rule, BOUNDS, 16),
        float32=PRECISE,
        gradients=DELTA,
        dtypes=(torch.float32,),
    ),
    Agreement(
        name="strong-vector-decay",
        inputs=partial(_delta_inputs, "vector", **VECTOR | {"heads": 1}, strength=200.0),
        call=_call(delta_rule, chunk_size=32),
        float32=PRECISE,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    *(
        Agreement(
            name=f"{decay}-step",
            inputs=partial(_delta_inputs, decay, **SMALL | {"time": 1}),
            call=_step(delta_rule_step, delta_rule),
            float32=PRECISE,
        )
        for decay in ("none", "scalar", "vector")
    ),
    Agreement(
        name="dplr-step",
        inputs=partial(_dplr_inputs, **SMALL_DPLR | {"time": 1}),
        call=_step(dplr_step, dplr),
        float32=("log_decay", "initial_state"),
    ),
    Agreement(
        name="dplr-inference",
        inputs=partial(_dplr_inputs, **SMALL_DPLR | {"batch": 1, "time": 40}),
        call=_call(dplr),
        float32=("log_decay", "initial_state"),
    ),
    Agreement(
        name="dplr-training",
        inputs=partial(_dplr_inputs, **SMALL_DPLR),
        call=_call(dplr, chunk_size=16),
        float32=("log_decay", "initial_state"),
        gradients=DPLR,
    ),
    Agreement(
        name="dplr-packed-inference",
        inputs=partial(_dplr_inputs, **{n: PACKED[n] for n in (*SMALL_DPLR, "sequences")} | {"heads": 1}),
        call=_call(dplr, BOUNDS, 16),
        float32=("log_decay", "initial_state"),
        dtypes=(torch.float32, torch.bfloat16),
    ),
]


def _table(meta, tokens, chunk, sequences):
    counts = tokens // chunk
    return (
        meta(counts, dtype=torch.int64),
        meta(counts, dtype=torch.int32),
        meta(sequences + 1, dtype=torch.int32),
    )


def _delta_forward(decay, key_dim=128, dtype=torch.bfloat16, chunk=64, tokens=8192, heads=32, value_dim=128):
    def launch(meta):
        keys, values = meta(tokens, heads // 2, key_dim, dtype=dtype), meta(tokens, heads, value_dim, dtype=dtype)
        gate = {"none": (), "scalar": (tokens, heads), "vector": (tokens, heads, key_dim)}[decay]
        log_decay = meta(*gate, dtype=torch.float32) if gate else None
        beta, state = meta(tokens, heads, dtype=dtype), meta(4, heads, key_dim, value_dim, dtype=torch.float32)
        table = _table(meta, tokens, chunk, 4)
        triton_op.delta_rule_op._init_fn(keys, keys, values, beta, log_decay, state, *table, 0.5, chunk)

    return launch


def _dplr_forward(key_dim=64, chunk=32, tokens=8192, heads=32, dtype=torch.bfloat16):
    def launch(meta):
        x, decay = meta(tokens, heads, key_dim, dtype=dtype), meta(tokens, heads, key_dim, dtype=torch.float32)
        state = meta(4, heads, key_dim, key_dim, dtype=torch.float32)
        triton_op.dplr_op._init_fn(x, x, x, x, x, decay, state, *_table(meta, tokens, chunk, 4), 0.5, chunk)

    return launch


def _reverse_pass(key_dim=128, dtype=torch.bfloat16, chunk=64, chunks=128, heads=32, value_dim=128, values=False):
    def launch(meta):
        w = meta(chunks, heads, chunk, key_dim, dtype=dtype)
        tail = meta(chunks, heads, chunk * (2 if values else 1), key_dim, dtype=dtype)
        dwritten = meta(chunks, heads, chunk, value_dim, dtype=dtype)
        dstates = meta(chunks, heads, key_dim, value_dim, dtype=dtype)
        dlast = meta(4, heads, key_dim, value_dim, dtype=torch.float32)
        decay = meta(chunks, heads, key_dim if values else 1, dtype=torch.float32)
        bounds = meta(5, dtype=torch.int32)
        triton_passes.state_pass_backward(w, tail, decay, values, dwritten, dstates, dlast, bounds)

    return launch


def _delta_step(decay, key_dim=128, heads=32, value_dim=128):
    def launch(meta):
        keys, values = meta(8, heads // 2, key_dim), meta(8, heads, value_dim)
        gate = {"none": (), "scalar": (8, heads), "vector": (8, heads, key_dim)}[decay]
        log_decay = meta(*gate, dtype=torch.float32) if gate else None
        state = meta(8, heads, key_dim, value_dim, dtype=torch.float32)
        triton_step.delta_rule_step_op._init_fn(keys, keys, values, meta(8, heads), log_decay, state, 0.5)

    return launch


def _dplr_step(meta):
    x, decay = meta(8, 32, 64), meta(8, 32, 64, dtype=torch.float32)
    state = meta(8, 32, 64, 64, dtype=torch.float32)
    triton_step.dplr_step_op._init_fn(x, x, x, x, x, decay, state, 0.5)


FORWARD_DOTS = frozenset({"_state_kernel", "_writes_kernel", "_output_kernel"})

# One or two registers that the compiler gives up to fit one more block on a multiprocessor.
ROUNDING = {"_output_kernel@100": 8}

COMPILATIONS = [
    Compilation(
        name="scalar-k128",
        launch=_delta_forward("scalar"),
        spill_bytes=ROUNDING,
        dots=FORWARD_DOTS | {"_scores_kernel"},
    ),
    Compilation(name="none-k128", launch=_delta_forward("none"), spill_bytes=ROUNDING, short=False),
    Compilation(
        name="vector-k128",
        launch=_delta_forward("vector"),
        spill_bytes=ROUNDING,
        dots=FORWARD_DOTS | {"_vector_scores_kernel"},
    ),
    Compilation(name="scalar-k256", launch=_delta_forward("scalar", 256), short=False),
    Compilation(name="scalar-k64", launch=_delta_forward("scalar", 64), short=False),
    Compilation(name="scalar-k60-v100", launch=_delta_forward("scalar", 60, value_dim=100), short=False),
    Compilation(
        name="scalar-k128-float32",
        launch=_delta_forward("scalar", dtype=torch.float32),
        # Three TF32 products for each float32 one: the state spills (112 bytes with Triton 3.9, 400 with 3.6).
        spill_bytes=ROUNDING | {"_state_kernel@90": 400, "_scores_kernel@100": 8},
        short=False,
    ),
    Compilation(
        name="reverse-k128-float32",
        launch=_reverse_pass(dtype=torch.float32),
        spill_bytes={"_state_backward_kernel@90": 288},  # 8 with Triton 3.9
        short=False,
    ),
    Compilation(name="dplr-k64", launch=_dplr_forward(), dots=FORWARD_DOTS),
    Compilation(name="step-scalar-k128", launch=_delta_step("scalar")),
    Compilation(name="step-vector-k128", launch=_delta_step("vector"), short=False),
    Compilation(name="step-none-k256", launch=_delta_step("none", 256), short=False),
    Compilation(name="step-dplr-k64", launch=_dplr_step, short=False),
    Compilation(name="reverse-k128", launch=_reverse_pass(), dots=frozenset({"_state_backward_kernel"})),
    Compilation(name="reverse-k64-values", launch=_reverse_pass(64, values=True), short=False),
    Compilation(name="reverse-k256", launch=_reverse_pass(256), short=False),
]


def _training(meta, batch, time):
    chunks = -(-batch * time // 64)
    _delta_forward("scalar", tokens=64 * chunks)(meta)
    _reverse_pass(chunks=chunks)(meta)


# A triangle of 64 is inverted by blocks of 16, then of 32.
FIRST_CALLS = [FirstCall(name="scalar-k128", launch=_training, most={"_merge_blocks_kernel": 2})]
