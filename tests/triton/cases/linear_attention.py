"""Decayed linear attention: every decay, shared keys, packed sequences, states, odd sizes."""

import torch
from support.cases import ALL_DTYPES, Agreement, Compilation, FirstCall

from archcompass.kernels.linear_attention import linear_attention, linear_attention_step, triton_op

STRONG = 20.0  # natural logarithms of decay per token: nothing survives a chunk


def _inputs(
    decay, batch=1, time=75, groups=1, heads=2, key_dim=20, value_dim=36, strength=0.3, sequences=None, **with_
):
    shapes = {
        "constant": (heads,),
        "scalar": (batch, time, heads),
        "vector": (batch, time, heads, key_dim),
    }
    made = {
        "q": torch.randn(batch, time, groups, key_dim).double(),
        "k": torch.randn(batch, time, groups, key_dim).double(),
        "v": torch.randn(batch, time, heads, value_dim).double(),
        "g": None if decay == "none" else -strength * torch.rand(shapes[decay]).double(),
        "state": torch.randn(sequences or batch, heads, key_dim, value_dim).double(),
        "bonus": torch.randn(heads, key_dim).double() if with_.get("bonus") else None,
    }
    return {name: x for name, x in made.items() if x is not None}


def _call(exclusive=False, cu=None):
    def call(backend, q, k, v, state, g=None, bonus=None):
        return linear_attention(
            q, k, v, g, bonus=bonus, exclusive=exclusive, scale=0.5, initial_state=state, backend=backend,
            cu_seqlens=None if cu is None else torch.tensor(cu),
        )  # fmt: skip

    return call


def _step_inputs(decay, bonus):
    made = _inputs(decay, batch=3, time=1, groups=2, heads=4, key_dim=20, value_dim=36, bonus=bonus)
    return {name: x if name in ("state", "bonus") or x.dim() == 1 else x[:, 0] for name, x in made.items()}


def _step(backend, q, k, v, state, g=None, bonus=None):
    with torch.no_grad():
        state = state.clone()
        if backend == "triton":
            return triton_op.step_op(q, k, v, g, bonus, state, bonus is not None, 0.5), state
        return linear_attention_step(q, k, v, g, state=state, bonus=bonus, exclusive=bonus is not None, scale=0.5)


HALVES = (torch.float32, torch.bfloat16)


def _agreement(name, decay, *, exclusive=False, cu=None, dtypes=HALVES, **options):
    bonus = ("bonus",) if options.get("bonus") else ()
    gates = () if decay == "none" else ("g",)
    return Agreement(
        name=name,
        inputs=lambda: _inputs(decay, **options),
        call=_call(exclusive, cu),
        float32=("g", "state", "bonus"),
        gradients=("q", "k", "v", "state", *gates, *bonus),
        dtypes=dtypes,
        # The gradient of a decay per channel is a difference of two sums whose terms were rounded apart.
        slack=3.0 if decay == "vector" else 2.0,
    )


PACK = [0, 1, 1, 40]  # a single token, an empty sequence, and a longer one

AGREEMENTS = [
    _agreement("none", "none", time=70),
    _agreement("constant", "constant", batch=2, time=33, groups=2, heads=4),
    _agreement("scalar", "scalar", key_dim=60, value_dim=100, dtypes=ALL_DTYPES),
    _agreement("scalar-strong", "scalar", strength=STRONG, time=70),
    _agreement("scalar-exclusive-packed", "scalar", exclusive=True, cu=PACK, sequences=3, time=40),
    _agreement("vector", "vector", time=40, key_dim=60, value_dim=24, dtypes=ALL_DTYPES),
    _agreement("vector-strong", "vector", strength=STRONG, time=40, groups=2),
    _agreement("vector-bonus-packed", "vector", exclusive=True, bonus=True, cu=PACK, sequences=3, time=40),
    _agreement("constant-one-token", "constant", time=1, dtypes=(torch.float32,)),
    *(
        Agreement(
            name=f"step-{decay}",
            inputs=lambda decay=decay, bonus=bonus: _step_inputs(decay, bonus),
            call=_step,
            float32=("g", "state", "bonus"),
        )
        for decay, bonus in (("none", False), ("constant", False), ("scalar", False), ("vector", True))
    ),
]


def _chunks(heads, groups, key_dim, value_dim, decay, dtype=torch.bfloat16, gradients=False, packed=False):
    """The launches of a whole call, on the sizes of a model."""
    batch, time = (1, 8192) if packed else (2, 4096)
    shapes = {"constant": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}

    def launch(meta):
        q, k = (meta(batch, time, groups, key_dim, dtype=dtype) for _ in range(2))
        v = meta(batch, time, heads, value_dim, dtype=dtype)
        g = None if decay == "none" else meta(*shapes[decay], dtype=torch.float32)
        cu = meta(6, dtype=torch.int32) if packed else None
        state = meta(5 if packed else batch, heads, key_dim, value_dim, dtype=torch.float32)
        if gradients:
            triton_op.backward(v, state, q, k, v, g, state, cu, False, 1.0)
        else:
            triton_op.forward(q, k, v, g, state, cu, False, 1.0)

    return launch


def _step_launch(heads, key_dim, value_dim, dtype=torch.bfloat16):
    def launch(meta):
        q, v = meta(8, heads, key_dim, dtype=dtype), meta(8, heads, value_dim, dtype=dtype)
        state = meta(8, heads, key_dim, value_dim, dtype=torch.float32)
        triton_op.step(q, q, v, meta(8, heads, dtype=torch.float32), None, state, False, 1.0)

    return launch


FORWARD_DOTS = frozenset({"_state_kernel", "_output_kernel"})
BACKWARD_DOTS = frozenset(
    {"_state_kernel", "_state_gradient_kernel", "_value_gradient_kernel", "_query_key_gradient_kernel"}
)
# Two to eight registers over the limit, on the generations since Hopper.
SPILLS = {
    "_query_key_gradient_kernel@90": 64,  # with Triton 3.6; less with 3.9
    "_query_key_gradient_kernel@100": 32,
    "_state_kernel@100": 8,
    "_state_gradient_kernel@100": 8,
    "_output_kernel@100": 8,
    "_query_key_gradient_kernel@120": 40,
    "_output_kernel@120": 8,
}
SHAPES = {  # heads, groups, K, V
    "mamba2": (80, 1, 128, 64, "scalar"),
    "retnet": (16, 16, 128, 256, "constant"),
    "linear": (16, 16, 64, 64, "none"),
    "gla": (4, 4, 256, 512, "vector"),
    "rwkv6": (32, 32, 64, 64, "vector"),
}

COMPILATIONS = [
    *(
        Compilation(
            name=f"{'backward' if gradients else 'forward'}-{name}",
            launch=_chunks(*shape, gradients=gradients),
            dots=(BACKWARD_DOTS if gradients else FORWARD_DOTS)
            | ({"_scores_kernel"} if shape[4] == "vector" else set()),
            spill_bytes=SPILLS,
            short=name in ("mamba2", "rwkv6"),
        )
        for name, shape in SHAPES.items()
        for gradients in (False, True)
    ),
    *(
        Compilation(
            name=f"forward-{name}-{str(dtype)[6:]}",
            launch=_chunks(*SHAPES[name], dtype=dtype),
            dots=FORWARD_DOTS,
            spill_bytes=SPILLS,
            short=False,
        )
        for name in ("mamba2", "gla")
        for dtype in (torch.float16, torch.float32)
    ),
    Compilation(
        name="packed-odd", launch=_chunks(6, 6, 60, 100, "scalar", packed=True), dots=FORWARD_DOTS, short=False
    ),
    *(Compilation(name=f"step-k{n}", launch=_step_launch(16, n, n), short=n == 128) for n in (64, 128, 256, 512)),
]


def _training(meta, batch, time):
    q, v, g = meta(batch, time, 1, 128), meta(batch, time, 32, 64), meta(batch, time, 32, dtype=torch.float32)
    state = meta(batch, 32, 128, 64, dtype=torch.float32)
    triton_op.forward(q, q, v, g, state, None, False, 1.0)
    triton_op.backward(v, state, q, q, v, g, state, None, False, 1.0)


FIRST_CALLS = [FirstCall(name="mamba2", launch=_training)]
