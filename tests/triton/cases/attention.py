"""Attention: what a query may not see, both ways of computing it, grouped heads of odd widths."""

import torch
from support.cases import Agreement, Compilation, FirstCall

from archcompass.kernels.attention import (
    attention,
    latent_attention,
    sparse_attention,
    triton_backward,
    triton_decode,
    triton_forward,
    triton_latent,
    triton_sparse,
)
from archcompass.kernels.attention.intervals import intervals
from archcompass.kernels.attention.pieces import Visibility


def _inputs(batch, new, keys, heads, kv_heads, key_dim, value_dim, sinks=False):
    torch.manual_seed(0)
    made = {
        "q": torch.randn(batch, new, heads, key_dim).double(),
        "k": torch.randn(batch, keys, kv_heads, key_dim).double(),
        "v": torch.randn(batch, keys, kv_heads, value_dim).double(),
    }
    return {**made, "sinks": torch.randn(heads).double()} if sinks else made


def _call(**options):
    def call(backend, **given):
        out, lse = attention(**given, **options, return_lse=True, backend=backend)
        return out, lse.exp()  # finite where nothing is seen

    return call


def _agreement(name, shape, sinks=False, step=False, **options):
    wanted = () if step else ("q", "k", "v", *(("sinks",) if sinks else ()))
    return Agreement(name=name, inputs=lambda: _inputs(*shape, sinks=sinks), call=_call(**options), gradients=wanted)


AGREEMENTS = [
    _agreement("causal-group-of-five", (1, 75, 75, 5, 1, 60, 60)),
    _agreement("all", (2, 33, 50, 2, 2, 16, 40), causal=False),
    _agreement("window-sinks", (1, 75, 75, 4, 2, 32, 32), sinks=True, window=9),
    _agreement("chunk-soft-cap", (1, 70, 90, 2, 1, 24, 24), chunk=32, key_offset=5, soft_cap=3.0),
    _agreement("padding", (2, 66, 66, 2, 1, 16, 16), padding=torch.tensor([21, 0])),
    _agreement("packed", (1, 90, 90, 2, 1, 16, 16), cu_seqlens=torch.tensor([0, 1, 1, 48, 90]), window=20),
    _agreement("nothing-seen", (1, 80, 20, 2, 1, 16, 16)),
    _agreement("step", (2, 1, 700, 6, 2, 60, 24), sinks=True, step=True),
    _agreement("few-steps-window", (2, 5, 600, 4, 1, 40, 40), step=True, window=300, padding=torch.tensor([0, 590])),
    _agreement("step-soft-cap-chunk", (1, 1, 300, 16, 1, 64, 64), step=True, chunk=128, soft_cap=2.0),
]

HALF = (torch.float16, torch.bfloat16)


def _latent_inputs(new, keys):
    torch.manual_seed(0)
    return {"q": torch.randn(2, new, 5, 68).double(), "latents": torch.randn(2, keys, 68).double()}


def _sparse_inputs(new, keys, heads, kv_heads, width, block_size, batch=2):
    torch.manual_seed(0)
    count = -(-keys // block_size)
    blocks = torch.rand(batch, new, kv_heads, count).topk(min(4, count)).indices
    blocks[:, 0, :, 1] = -1
    return {**_inputs(batch, new, keys, heads, kv_heads, width, width), "blocks": blocks}


def _sparse(block_size):
    def call(backend, **given):
        out, lse = sparse_attention(**given, block_size=block_size, backend=backend)
        return out, lse.exp()

    return call


AGREEMENTS += [
    Agreement(
        name="latent-step",
        inputs=lambda: _latent_inputs(1, 600),
        dtypes=HALF,
        call=lambda backend, q, latents: latent_attention(q, latents, 48, scale=0.1, backend=backend),
    ),
    Agreement(
        name="latent-steps-padding",
        inputs=lambda: _latent_inputs(3, 40),
        dtypes=HALF,
        call=lambda backend, q, latents: latent_attention(
            q, latents, 48, scale=0.1, padding=torch.tensor([0, 38]), backend=backend
        ),
    ),
    Agreement(
        name="latent-prompt",
        inputs=lambda: _latent_inputs(75, 90),
        dtypes=HALF,
        call=lambda backend, q, latents: latent_attention(
            q, latents, 60, scale=0.1, padding=torch.tensor([0, 19]), backend=backend
        ),
        gradients=("q", "latents"),
    ),
    Agreement(
        name="sparse-prompt-group-of-three",
        inputs=lambda: _sparse_inputs(75, 90, 3, 1, 60, 48, batch=1),
        call=_sparse(48),
        gradients=("q", "k", "v"),
    ),
    Agreement(name="sparse-step", inputs=lambda: _sparse_inputs(1, 300, 6, 2, 60, 32), call=_sparse(32)),
    Agreement(
        name="sparse-prompt",
        inputs=lambda: _sparse_inputs(9, 70, 4, 1, 16, 16),
        call=_sparse(16),
        gradients=("q", "k", "v"),
    ),
]

CAUSAL = Visibility(True, None, None, 0, 0.1, None)
RICH = Visibility(True, 4096, None, 0, 0.1, 50.0)


def _tensors(meta, batch, new, keys, heads, kv_heads, width, value, dtype=torch.bfloat16):
    made = [meta(batch, new, heads, width, dtype=dtype), meta(batch, keys, kv_heads, width, dtype=dtype)]
    return *made, meta(batch, keys, kv_heads, value, dtype=dtype)


def _ends(q, k, see):
    return intervals(q.shape[1], k.shape[1], see, None, None, q.device)


def _forward(see, *shape, sinks=False, **kind):
    def launch(meta):
        q, k, v = _tensors(meta, *shape, **kind)
        triton_forward.forward(q, k, v, meta(q.shape[2]) if sinks else None, *_ends(q, k, see), see)

    return launch


def _backward(see, *shape, **kind):
    def launch(meta):
        q, k, v = _tensors(meta, *shape, **kind)
        lse = meta(*q.shape[:1], q.shape[2], q.shape[1], dtype=torch.float32)
        grad = meta(*q.shape[:3], v.shape[3], dtype=q.dtype)
        triton_backward.backward(grad, q, k, v, grad, lse, *_ends(q, k, see), see)

    return launch


def _split(see, *shape, sinks=False, **kind):
    def launch(meta):
        q, k, v = _tensors(meta, *shape, **kind)
        triton_decode.split(q, k, v, meta(q.shape[2]) if sinks else None, *_ends(q, k, see), see)

    return launch


def _split_sparse(meta, batch=1, new=2048, keys=8192):
    q, k, v = _tensors(meta, batch, new, keys, 64, 4, 128, 128)
    blocks = meta(batch, new, 4, 16, dtype=torch.int32)
    triton_decode.split(q, k, v, None, *_ends(q, k, CAUSAL), CAUSAL, blocks, 64)


def _backward_sparse(*shape, **kind):
    def launch(meta):
        q, k, v = _tensors(meta, *shape, **kind)
        lse, blocks = (
            meta(*q.shape[:1], q.shape[2], q.shape[1], dtype=torch.float32),
            meta(*q.shape[:2], k.shape[2], 16),
        )
        grad = meta(*q.shape[:3], v.shape[3], dtype=q.dtype)
        triton_sparse.backward(grad, lse, q, k, v, blocks.to(torch.int32), grad, lse, 64, 0.1)

    return launch


def _backward_latent(meta):
    q, latents, grad = meta(2, 2048, 128, 576), meta(2, 4096, 576), meta(2, 2048, 128, 512)
    lse = meta(2, 128, 2048, dtype=torch.float32)
    triton_latent.backward(grad, q, latents, grad, lse, 512, *_ends(q, latents, CAUSAL), 0.1)


def _latent(dtype=torch.bfloat16):
    def launch(meta):
        q, latents = meta(8, 1, 128, 576, dtype=dtype), meta(8, 8192, 576, dtype=dtype)
        triton_latent.forward(q, latents, 512, *_ends(q, latents, CAUSAL), 0.1)

    return launch


FORWARD = frozenset({"_attention_forward_kernel"})
BACKWARD = frozenset({"_attention_backward_keys_kernel", "_attention_backward_queries_kernel"})
# At width 256 on the smallest register files: two registers of 128.
SPILLS = {f"_attention_backward_queries_kernel@{capability}": 8 for capability in (86, 89)}
SPILLS |= {"_attention_backward_keys_kernel@100": 8}  # with Triton 3.6; none with 3.9
SPLIT = frozenset({"_attention_split_kernel"})
LATENT_BACKWARD = frozenset({"_latent_backward_keys_kernel", "_latent_backward_queries_kernel"})
SPARSE_BACKWARD = frozenset({"_sparse_backward_keys_kernel", "_sparse_backward_queries_kernel"})

COMPILATIONS = [
    *(
        Compilation(
            name=f"forward-{d}", launch=_forward(CAUSAL, 2, 2048, 2048, 32, 8, d, d), dots=FORWARD, short=d == 128
        )
        for d in (64, 128, 256)
    ),
    Compilation(
        name="forward-192-128",
        launch=_forward(CAUSAL, 2, 2048, 2048, 32, 32, 192, 128),
        dots=FORWARD,
        short=False,
    ),
    Compilation(
        name="forward-rich",
        launch=_forward(RICH, 2, 2048, 2048, 32, 8, 128, 128, sinks=True),
        dots=FORWARD,
        short=False,
    ),
    Compilation(
        name="forward-float32-64",
        launch=_forward(CAUSAL, 2, 2048, 2048, 32, 8, 64, 64, dtype=torch.float32),
        dots=FORWARD,
        short=False,
    ),
    *(
        Compilation(
            name=f"backward-{d}",
            launch=_backward(CAUSAL, 2, 2048, 2048, 32, 8, d, d),
            dots=BACKWARD,
            spill_bytes=SPILLS,
            short=d == 128,
        )
        for d in (64, 128, 256)
    ),
    Compilation(
        name="backward-rich",
        launch=_backward(RICH, 2, 2048, 2048, 32, 8, 128, 128),
        dots=BACKWARD,
        spill_bytes=SPILLS,
        short=False,
    ),
    *(
        Compilation(
            name=f"split-{d}", launch=_split(CAUSAL, 8, 1, 8192, 32, 8, d, d, sinks=True), dots=SPLIT, short=d == 128
        )
        for d in (64, 128, 256)
    ),
    Compilation(
        name="split-sparse",
        launch=_split_sparse,
        dots=SPLIT,
        short=False,
    ),
    Compilation(name="latent-512-64", launch=_latent(), dots=frozenset({"_latent_split_kernel"})),
    Compilation(name="backward-latent-512-64", launch=_backward_latent, dots=LATENT_BACKWARD),
    *(
        Compilation(
            name=f"backward-sparse-{d}",
            launch=_backward_sparse(1, 2048, 8192, 64, 4, d, d),
            dots=SPARSE_BACKWARD,
            spill_bytes={"_sparse_backward_keys_kernel@100": 8},  # with Triton 3.6; none with 3.9
            short=d == 128,
        )
        for d in (64, 128, 256)
    ),
    Compilation(
        name="backward-sparse-float32-128",
        launch=_backward_sparse(1, 2048, 8192, 64, 4, 128, 128, dtype=torch.float32),
        dots=SPARSE_BACKWARD,
        spill_bytes={"_sparse_backward_keys_kernel": 16},
        short=False,
    ),
    *(
        Compilation(
            name=f"forward-float32-{d}",
            launch=_forward(CAUSAL, 2, 2048, 2048, 32, 8, d, d, dtype=torch.float32),
            dots=FORWARD,
            short=False,
        )
        for d in (128,)
    ),
    *(
        Compilation(
            name=f"backward-float32-{d}",
            launch=_backward(CAUSAL, 2, 2048, 2048, 32, 8, d, d, dtype=torch.float32),
            dots=BACKWARD,
            short=False,
            spill_bytes={"_attention_backward_queries_kernel@120": 8},
        )
        for d in (64, 128)
    ),
    *(
        Compilation(
            name=f"split-float32-{d}",
            launch=_split(CAUSAL, 8, 1, 8192, 32, 8, d, d, dtype=torch.float32),
            dots=SPLIT,
            short=False,
        )
        for d in (64, 128)
    ),
    Compilation(name="split-many-rows", launch=_split(CAUSAL, 8, 4, 8192, 64, 4, 128, 128), dots=SPLIT, short=False),
]


def _prompt_and_step(meta, batch, time):
    for launch in (_forward, _backward):
        launch(CAUSAL, batch, time, time, 32, 8, 128, 128)(meta)
    _split(CAUSAL, batch, 1, time, 32, 8, 128, 128)(meta)


def _latent_training(meta, batch, time):
    q, latents, grad = meta(batch, time, 16, 576), meta(batch, time, 576), meta(batch, time, 16, 512)
    ends, lse = _ends(q, latents, CAUSAL), meta(batch, 16, time, dtype=torch.float32)
    triton_latent.forward(q, latents, 512, *ends, 0.1)
    triton_latent.backward(grad, q, latents, grad, lse, 512, *ends, 0.1)


def _sparse_training(meta, batch, time):
    _split_sparse(meta, batch, time, time)
    _backward_sparse(batch, time, time, 64, 4, 128, 128)(meta)


MERGES = {"_attention_merge_kernel": 7}  # 1, 2, 4 ... 64 splits

FIRST_CALLS = [
    FirstCall(name="causal", launch=_prompt_and_step, most=MERGES),
    FirstCall(name="latent", launch=_latent_training, most=MERGES),
    FirstCall(name="sparse", launch=_sparse_training, most=MERGES),
]
