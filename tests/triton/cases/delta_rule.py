"""The delta rule and DPLR: inference and training, batches and packed sequences, single steps."""

from functools import partial

import torch
from support.cases import Agreement, Compilation, FirstCall
from torch.nn.functional import normalize

from archcompass.kernels.delta_rule import (
    delta_rule,
    delta_rule_step,
    dplr,
    dplr_step,
    triton_op,
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
    Agreement(
        name="none-training",
        inputs=partial(_delta_inputs, "none", **SMALL),
        call=_call(delta_rule, chunk_size=16),
        float32=PRECISE,
        gradients=DELTA,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Agreement(
        name="scalar-training",
        inputs=partial(_delta_inputs, "scalar", **SHAPE),
        call=_call(delta_rule, chunk_size=64),
        float32=PRECISE,
        gradients=DELTA,
    ),
    Agreement(
        name="vector-training",
        inputs=partial(_delta_inputs, "vector", **SHAPE | {"time": 40, "value_dim": 24}),
        call=_call(delta_rule, chunk_size=32),
        float32=PRECISE,
        gradients=DELTA,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Agreement(
        name="packed-inference",
        inputs=partial(_delta_inputs, "none", **PACKED),
        call=_call(delta_rule, BOUNDS, 16),
        float32=PRECISE,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    *(
        Agreement(
            name=f"packed-{decay}-training",
            inputs=partial(_delta_inputs, decay, **PACKED),
            call=_call(delta_rule, BOUNDS, 16),
            float32=PRECISE,
            gradients=DELTA,
            dtypes=(torch.float32,),
        )
        for decay in ("scalar", "vector")
    ),
    *(
        Agreement(
            name=f"strong-{decay}-decay",
            inputs=partial(_delta_inputs, decay, **VECTOR | {"heads": 1}, strength=strength),
            call=_call(delta_rule, chunk_size=32),
            float32=PRECISE,
            gradients=DELTA,
            dtypes=(torch.float32, torch.bfloat16),
        )
        for decay, strength in (("scalar", 20.0), ("vector", 200.0))
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
        name="dplr-packed-training",
        inputs=partial(_dplr_inputs, **{n: PACKED[n] for n in (*SMALL_DPLR, "sequences")} | {"heads": 1}),
        call=_call(dplr, BOUNDS, 16),
        float32=("log_decay", "initial_state"),
        gradients=DPLR,
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


def _delta(
    decay, key_dim=128, dtype=torch.bfloat16, chunk=64, tokens=8192, heads=32, value_dim=128, group=2, sequences=4,
    training=False,
):  # fmt: skip
    """The launches of a whole call; of its gradients where `training`."""

    def launch(meta):
        keys, values = meta(tokens, heads // group, key_dim, dtype=dtype), meta(tokens, heads, value_dim, dtype=dtype)
        gate = {"none": (), "scalar": (tokens, heads), "vector": (tokens, heads, key_dim)}[decay]
        log_decay = meta(*gate, dtype=torch.float32) if gate else None
        beta, state = meta(tokens, heads, dtype=dtype), meta(sequences, heads, key_dim, value_dim, dtype=torch.float32)
        given = (keys, keys, values, beta, log_decay, state, *_table(meta, tokens, chunk, sequences))
        if training:
            squares = (meta(tokens // chunk, heads, chunk, chunk, dtype=dtype) for _ in range(2))
            triton_op.delta_rule_backward_op._init_fn(values, state, *given, *squares, 0.5, chunk)
        else:
            triton_op.delta_rule_op._init_fn(*given, 0.5, chunk)

    return launch


def _dplr(key_dim=64, chunk=64, tokens=8192, heads=32, dtype=torch.bfloat16, training=False):
    def launch(meta):
        x, decay = meta(tokens, heads, key_dim, dtype=dtype), meta(tokens, heads, key_dim, dtype=torch.float32)
        state = meta(4, heads, key_dim, key_dim, dtype=torch.float32)
        given = (x, x, x, x, x, decay, state, *_table(meta, tokens, chunk, 4))
        if training:
            squares = (meta(tokens // chunk, heads, chunk, chunk, dtype=dtype) for _ in range(4))
            triton_op.dplr_backward_op._init_fn(x, state, *given, *squares, 0.5, chunk)
        else:
            triton_op.dplr_op._init_fn(*given, 0.5, chunk)

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
BACKWARD_DOTS = frozenset(
    {"_state_backward_kernel", "_output_gradient_kernel", "_pairs_gradient_kernel", "_rows_gradient_kernel"}
)

# One or two registers that the compiler gives up to fit one more block on a multiprocessor.
ROUNDING = {"_output_kernel@100": 8, "_output_gradient_kernel@100": 16, "_vector_scores_kernel@90": 8}
# The four kinds of scores of DPLR meet in one loop, and twelve registers are missing.
FOUR_KINDS = ROUNDING | {f"_rows_gradient_kernel@{capability}": 48 for capability in (86, 89, 120)}
# Three TF32 products for each float32 one: four kinds of rows do not stay in registers; Triton 3.6 lacks a few more.
FLOAT32 = ROUNDING | {"_writes_kernel": 8, "_rows_gradient_kernel": 256, "_rows_gradient_kernel@80": 272}
FLOAT32 |= {f"_output_kernel@{capability}": 8 for capability in (80, 86, 89)}

COMPILATIONS = [
    *(
        Compilation(
            name=f"{name}-{'backward' if training else 'forward'}",
            launch=launch(training=training),
            spill_bytes=FLOAT32 if "float32" in name else FOUR_KINDS,
            dots=BACKWARD_DOTS if training else FORWARD_DOTS,
            short=name in short,
        )
        for training, short in (
            (False, ("scalar-k128", "vector-k128", "dplr-k64")),
            (True, ("scalar-k128", "dplr-k64")),
        )
        for name, launch in {
            "scalar-k128": partial(_delta, "scalar"),
            "none-k128": partial(_delta, "none"),
            "vector-k128": partial(_delta, "vector", group=1),
            "scalar-k256": partial(_delta, "scalar", 256),
            "scalar-k64": partial(_delta, "scalar", 64),
            "scalar-k60-v100": partial(_delta, "scalar", 60, value_dim=100),
            "scalar-k128-float32": partial(_delta, "scalar", dtype=torch.float32, chunk=32),
            "vector-k128-float32": partial(_delta, "vector", dtype=torch.float32, chunk=32, group=1),
            "dplr-k64": _dplr,
            "dplr-k64-chunk32": partial(_dplr, chunk=32),
            "dplr-k64-float32": partial(_dplr, dtype=torch.float32, chunk=32),
        }.items()
    ),
    Compilation(name="step-scalar-k128", launch=_delta_step("scalar")),
    Compilation(name="step-vector-k128", launch=_delta_step("vector"), short=False),
    Compilation(name="step-none-k256", launch=_delta_step("none", 256), short=False),
    Compilation(name="step-dplr-k64", launch=_dplr_step, short=False),
]


def _training(meta, batch, time):
    tokens = 64 * -(-batch * time // 64)
    _delta("scalar", tokens=tokens, sequences=batch)(meta)
    _delta("scalar", tokens=tokens, sequences=batch, training=True)(meta)


# A triangle of 64 is inverted by blocks of 16, then of 32.
FIRST_CALLS = [FirstCall(name="scalar-k128", launch=_training, most={"_merge_blocks_kernel": 2})]
