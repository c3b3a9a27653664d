"""Absorbed multi-head latent attention: all heads attend to one cache of latents (DeepSeek-V2, arXiv 2405.04434, 2.1).

A token's keys and values are one latent of `rank` numbers and one rotary key of a few more. With the key's up
projection absorbed into the query and the value's into the output, attention reads the cache as it is: scores from
the whole row, values from its first `rank` columns. Meant for decoding; for prompts the expanded heads are cheaper.
"""

import torch
from torch import Tensor

from archcompass.errors import InputError
from archcompass.kernels.attention.op import attention
from archcompass.kernels.dispatch import Choice, choose

WIDEST_LATENT = 512


def latent_attention(
    q: Tensor,
    latents: Tensor,
    rank: int,
    *,
    scale: float,
    padding: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """softmax(scale q latentsᵀ) latents[..., :rank], causal; the queries are the last positions of the latents.

    Args:
        q: [batch, new, heads, rank + rope]: the absorbed query, then the rotated part.
        latents: [batch, keys, rank + rope]: the normed latent, then the rotated key all heads share.
        rank: width of the latent.
        scale: of the scores; that of the expanded heads, so not a function of these widths.
        padding: [batch] integers, left padding of each row.
        backend: "auto", "reference", "torch" or "triton".
        strict: with "auto", refuse to fall back from the fastest backend.

    Returns:
        [batch, new, heads, rank], to which the value's up projection is yet to be applied.

    Raises:
        InputError: shapes that do not fit together.
        BackendError: the backend asked for cannot serve this call.
    """
    _check(q, latents, rank)
    choice = explain(q, latents, rank, backend=backend, strict=strict)
    keys = latents.unsqueeze(2)
    if q.device.type == "meta" or choice.backend == "reference":
        serving = "reference" if choice.backend == "reference" else "auto"
        return _only(attention(q, keys, keys[..., :rank], scale=scale, padding=padding, backend=serving))
    if choice.backend == "triton":
        from archcompass.kernels.attention.triton_op import latent_triton

        return latent_triton(q, latents, padding, rank, scale)
    # The whole row serves as value too: the surplus columns cost less than a copy of the cache without them.
    return _only(attention(q, keys, keys, scale=scale, padding=padding, backend="torch"))[..., :rank]


def explain(q: Tensor, latents: Tensor, rank: int, *, backend: str = "auto", strict: bool = False) -> Choice:
    """Which implementation `latent_attention` takes for such tensors, and why."""
    refusals = {}
    if q.dtype in (torch.float32, torch.float64):
        refusals["triton"] = f"latents in {q.dtype} do not fit a tile; the kernel takes the half types"
    elif rank > WIDEST_LATENT:
        refusals["triton"] = f"a latent of {rank} is wider than {WIDEST_LATENT}, which is what a tile holds"
    return choose("latent_attention", backend, q.device, refusals=refusals, strict=strict)


def _only(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)  # return_lse was not asked for
    return result


def _check(q: Tensor, latents: Tensor, rank: int) -> None:
    shapes = f"q {list(q.shape)}, latents {list(latents.shape)}"
    if q.ndim != 4 or latents.ndim != 3 or q.shape[0] != latents.shape[0] or q.shape[3] != latents.shape[2]:
        raise InputError(f"{shapes}: latent_attention takes [batch, new, heads, width] and [batch, keys, width]")
    if not 1 <= rank < q.shape[3]:
        raise InputError(
            f"rank is {rank}; it must lie between 1 and {q.shape[3] - 1}, the width less one rotary column"
        )
