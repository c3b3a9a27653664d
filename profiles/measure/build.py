"""Real modules for measuring: full size, filled in seconds rather than drawn number by number.

Time does not depend on the values as long as they are ordinary ones: neither zeros, which share one page of memory and so one
line of cache, nor denormals. Large tensors are therefore filled with copies of a small pool of normal numbers, each of its
own: with one pool for all, tokens whose embedding was a row of a later projection met it in full, which a model never learned
and a start at random never has (heads of Mamba-2 then forgot all at once). Small ones get their proper start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from archcompass.blocks.base import Block
from archcompass.blocks.model.module import LanguageModel, Sublayer
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.runtime import BlockModule, Linear
from archcompass.errors import InputError
from archcompass.profiles.request import Request

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_POOL_ELEMENTS = 2**20
_LARGE_ELEMENTS = 2**18

_EMBEDDING_SCALE = 50.0
"""Keeps tokens apart in the stream of a model that never learned anything: experts are then chosen about evenly, as training
would have it, where small embeddings send all tokens to the same few."""


def device_of(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        InputError: this machine has none, or its kind is unknown.
    """
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch finds no CUDA device here; nearest: cpu")
    return torch.device(name)


def dtype_of(request: Request) -> torch.dtype:
    """What the native blocks compute in; quantised weights are measured in the dtype they are widened to."""
    return DTYPES[request.activations]


def model(spec: ModelSpec, device: torch.device, dtype: torch.dtype, training: bool = False) -> LanguageModel:
    """The whole model, ready to be timed; `training` keeps embeddings small, since large ones, where they are the head as
    well, would make a loss of denormals."""
    with _defaults(device, dtype):
        built = LanguageModel(spec)
    fill(built)
    with torch.no_grad():
        built.embedding.weight.mul_(1.0 if training else _EMBEDDING_SCALE)
    return built.eval()


def sublayer(spec: ModelSpec, name: str, device: torch.device, dtype: torch.dtype) -> Sublayer:
    """One sublayer of the block called `name`, at the first depth it stands at."""
    depth = next(depth for depth, layer in enumerate(spec.expanded) if name in layer)
    with _defaults(device, dtype):
        built = Sublayer(spec.residual_of(name), spec.blocks[name].build(spec.hidden_size, depth), spec.hidden_size)
    fill(built)
    return built.eval()


def block(described: Block, width: int, device: torch.device, dtype: torch.dtype) -> BlockModule:
    """One block alone (embedding, norm, head)."""
    with _defaults(device, dtype):
        built = described.build(width)
    fill(built)
    return built.eval()


def fill(module: nn.Module) -> None:
    """Gives every parameter ordinary values."""
    for child in module.modules():
        own = list(child.parameters(recurse=False))
        if any(parameter.numel() > _LARGE_ELEMENTS for parameter in own):
            for parameter in own:
                _fill_from_pool(parameter.data)
        elif isinstance(child, BlockModule | Linear):
            child.reset_parameters()


def _fill_from_pool(tensor: torch.Tensor) -> None:
    flat = tensor.view(-1)
    pool = torch.empty(min(flat.numel(), _POOL_ELEMENTS), dtype=torch.float32, device="cpu").normal_(std=0.02)
    pool = pool.to(tensor.device, tensor.dtype)
    whole = flat.numel() // len(pool) * len(pool)
    flat[:whole].view(-1, len(pool)).copy_(pool)
    flat[whole:].copy_(pool[: flat.numel() - whole])


def available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        from archcompass.profiles.cpu import memory_bytes

        return memory_bytes() // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
