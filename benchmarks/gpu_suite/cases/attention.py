"""Attention: prompts, steps, windows, gradients; latent and block-sparse attention. Beside torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from archcompass.kernels.attention import (
    attention,
    attention_cost,
    latent_attention,
    latent_attention_cost,
    sparse_attention,
    sparse_attention_cost,
)
from archcompass.kernels.dispatch import Backend
from gpu_suite.case import Call, Case, Inputs, Maker, Shape, Work, work


def heads_of(make: Maker, s: Shape) -> Inputs:
    new = s.get("new", s["keys"])
    keys = (s["batch"], s["keys"], s["kv_heads"], s["dim"])
    return {"q": make.normal(s["batch"], new, s["heads"], s["dim"]), "k": make.normal(*keys), "v": make.normal(*keys)}


def sdpa(backend: SDPBackend) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped, causal = q.shape[2] > k.shape[2], q.shape[1] > 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return call


SDPA = {
    "torch SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "torch SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
}


def attention_work(window: int | None = None) -> Callable[[Shape], Work]:
    def of(s: Shape) -> Work:
        return work(
            attention_cost(
                batch=s["batch"], new_tokens=s.get("new", s["keys"]), keys=s["keys"], heads=s["heads"],
                kv_heads=s["kv_heads"], key_dim=s["dim"], value_dim=s["dim"], window=window, element_bytes=2,
            )
        )  # fmt: skip

    return of


def attention_case(
    kind: str, size: str, batch: int, keys: int, heads: int, kv_heads: int, dim: int, **more: Any
) -> Case:
    step = kind == "decode"
    real = {"batch": batch, "keys": keys, "heads": heads, "kv_heads": kv_heads, "dim": dim} | (
        {"new": 1} if step else {}
    )
    tiny = {"batch": 1, "keys": 70 if step else 37, "heads": 2, "kv_heads": 1, "dim": 16}
    window = more.pop("window", None)

    def call(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Any:
        near = window if window is None or k.shape[1] > window else k.shape[1] // 3
        return attention(q, k, v, window=near, backend=backend)

    others = SDPA if window is None else {"our torch path": lambda q, k, v: call("torch", q, k, v)}
    if step:
        others = {"torch path, SDPA by kv head": lambda q, k, v: call("torch", q, k, v), **SDPA}
    return Case(
        operation="attention", kind=kind, size=size, real=real, check={"batch": 2, "keys": 333}, tiny=tiny, call=call,
        inputs=heads_of, work=attention_work(window), peers=others, backward_products=2.5, **more,
    )  # fmt: skip


def latent_inputs(make: Maker, s: Shape) -> Inputs:
    width = s["rank"] + s["rope"]
    return {
        "q": make.normal(s["batch"], s["new"], s["heads"], width),
        "latents": make.normal(s["batch"], s["keys"], width),
    }


def latent_call(backend: Backend, q: Tensor, latents: Tensor) -> Any:
    return latent_attention(q, latents, latents.shape[-1] * 8 // 9, scale=0.1, backend=backend)


def latent_work(s: Shape) -> Work:
    widths = {"rank": s["rank"], "rope_dim": s["rope"], "element_bytes": 2}
    cost = latent_attention_cost(batch=s["batch"], new_tokens=s["new"], keys=s["keys"], heads=s["heads"], **widths)
    return work(cost)


def sparse_inputs(make: Maker, s: Shape) -> Inputs:
    """Random blocks for every query and kv head, none of them in the future."""
    now = torch.arange(s["keys"], device=make.device)[:, None] // s["block"]
    block = torch.arange(-(-s["keys"] // s["block"]), device=make.device)
    liking = torch.rand(s["batch"], s["keys"], s["kv_heads"], len(block), device=make.device)
    best = liking.masked_fill((block > now)[None, :, None], -1.0).topk(min(s["slots"], len(block)), dim=-1)
    return heads_of(make, s) | {"blocks": best.indices.masked_fill(best.values < 0, -1)}


def sparse_call(block: int) -> Call:
    def call(backend: Backend, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Any:
        return sparse_attention(q, k, v, blocks, block, backend=backend)

    return call


def sparse_work(s: Shape) -> Work:
    sizes = {"slots": s["slots"], "block_size": s["block"], "element_bytes": 2}
    heads = {"heads": s["heads"], "kv_heads": s["kv_heads"], "key_dim": s["dim"], "value_dim": s["dim"]}
    return work(sparse_attention_cost(batch=s["batch"], new_tokens=s["keys"], **heads, **sizes))


def cases() -> Iterator[Case]:
    leaves = ("q", "k", "v")
    yield attention_case("prefill", "16 heads x 128, 2 x 8192", 2, 8192, 16, 16, 128, quick=True)
    yield attention_case("decode", "32/8 heads x 128, 32 x 8192", 32, 8192, 32, 8, 128, quick=True)
    yield attention_case("backward", "16 heads x 128, 2 x 8192", 2, 8192, 16, 16, 128, gradients=leaves, quick=True)
    yield attention_case("prefill", "32/8 heads x 128, 4 x 4096", 4, 4096, 32, 8, 128)
    yield attention_case("prefill", "32 heads x 64, 2 x 8192", 2, 8192, 32, 32, 64)
    yield attention_case("prefill in a window", "32/8 heads x 128, 16384, 1024 seen", 1, 16384, 32, 8, 128, window=1024)
    yield attention_case("decode", "32/8 heads x 128, 1 x 131072", 1, 131072, 32, 8, 128)
    yield attention_case("backward", "32 heads x 64, 2 x 8192", 2, 8192, 32, 32, 64, gradients=leaves)
    latent: dict[str, Any] = {
        "operation": "latent_attention", "inputs": latent_inputs, "call": latent_call, "work": latent_work,
        "check": {"batch": 2, "keys": 333}, "interpreted": torch.float16,
        "peers": {"torch path, SDPA": lambda q, latents: latent_call("torch", q, latents)},
    }  # fmt: skip
    heads = {"heads": 128, "rank": 512, "rope": 64}
    few = {"batch": 1, "keys": 40, "heads": 2, "rank": 32, "rope": 4}
    step, prompt = {"batch": 32, "keys": 4096, "new": 1} | heads, {"batch": 1, "keys": 2048, "new": 2048} | heads
    yield Case(**latent, kind="decode", size="128 heads, 512 + 64, 32 x 4096", real=step, tiny=few)
    yield Case(
        **latent | {"check": {"keys": 203, "new": 203}}, kind="backward", size="128 heads, 512 + 64, 2048", real=prompt,
        tiny=few | {"new": 40}, gradients=("q", "latents"), backward_products=(3 * 576 + 2 * 512) / (576 + 512),
    )  # fmt: skip
    sparse: dict[str, Any] = {
        "operation": "sparse_attention", "size": "32/2 heads x 128, 4096, 16 blocks of 64", "inputs": sparse_inputs,
        "real": {"batch": 1, "keys": 4096, "heads": 32, "kv_heads": 2, "dim": 128, "slots": 16, "block": 64},
        "check": {"keys": 333, "slots": 4}, "call": sparse_call(64), "work": sparse_work,
        "tiny": {"keys": 70, "heads": 2, "kv_heads": 1, "dim": 16, "slots": 1},
    }  # fmt: skip
    yield Case(**sparse, kind="prefill")
    yield Case(**sparse, kind="backward", gradients=leaves, backward_products=2.5)
