"""Ladders of model shapes, smallest first: what each family looks like at every size from ten thousand weights to trillions.

Every rung is at least as wide and as deep as the one below, so memory and time only grow along a ladder and the biggest
that fits is found by bisection. Widths are multiples of 64 and from 1024 on of 128, heads have 64 or 128 channels: what
tensor cores like. Depth over width follows published models (Llama 3, Qwen 3, Mamba-2, Jamba, Qwen3-Next); Kaplan et al.
(arXiv 2001.08361) find loss flat in that ratio over a wide range.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log, sqrt
from typing import Literal

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import Block
from archcompass.blocks.gated_delta_net.spec import GatedDeltaNet
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.blocks.rope import Rope

Family = Literal["transformer", "moe", "ssm", "hybrid"]

FAMILIES: tuple[Family, ...] = ("transformer", "moe", "ssm", "hybrid")

TIED_BELOW = 2048
"""Models narrower than this share input table and head, as Llama 3.2 1B, Qwen 3 0.6B and Gemma do."""

# (width, layers) of published dense models; between them the logarithm is interpolated.
DENSE_DEPTH = (
    (32, 2),
    (64, 2),
    (256, 6),
    (512, 8),
    (1024, 20),
    (2048, 26),
    (4096, 34),
    (5120, 46),
    (8192, 76),
    (16384, 126),
)
# Experts make a layer large, so such models are narrow and deep: Qwen3-30B-A3B 2048 x 48, 235B-A22B 4096 x 94.
EXPERT_DEPTH = ((128, 4), (512, 12), (1024, 24), (2048, 44), (4096, 72), (7168, 92), (16384, 126))
# One sublayer a layer: Mamba-2 130M 768 x 24, 2.7B 2560 x 64, Codestral-Mamba 7B 4096 x 64.
RECURRENT_DEPTH = ((32, 2), (64, 2), (256, 8), (768, 24), (1536, 44), (2560, 60), (4096, 64), (8192, 96), (16384, 128))


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What of a family's shape is decided by the workload and not by size.

    Attributes:
        family: which corner.
        vocab_size: tokens of large models; narrow ones take at most 32,768.
        experts, chosen: routed experts and how many a token uses; 0 for a dense channel mixer.
        period: layers per attention layer of a hybrid; 4 is an attention share of 1/4.
        window: keys a sliding-window layer sees; None for full attention everywhere.
        full_every: with a window, one layer in so many sees everything; 0 for none.
    """

    family: Family
    vocab_size: int
    experts: int = 0
    chosen: int = 0
    period: int = 0
    window: int | None = None
    full_every: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """One rung: width and depth."""

    width: int
    layers: int


def ladder(style: Style) -> tuple[Shape, ...]:
    """The rungs of a family, smallest first."""
    if style.family == "ssm":
        return _rungs(RECURRENT_DEPTH, 1)
    return _rungs(EXPERT_DEPTH if style.experts else DENSE_DEPTH, style.period or 1)


@lru_cache(maxsize=64)
def _rungs(table: tuple[tuple[int, int], ...], period: int) -> tuple[Shape, ...]:
    """At each width, every depth from its own to that of the next width, in steps of two layers or a period."""
    widths = [width for width in _widths() if width >= table[0][0]]
    step = max(2, period)
    rungs = []
    for width, following in zip(widths, [*widths[1:], widths[-1]], strict=True):
        first, last = (ceil(_depth(table, each) / step) * step for each in (width, following))
        rungs += [Shape(width, layers) for layers in range(first, max(last, first + 1), step)]
        if last > first:
            rungs.append(Shape(width, last))
    return tuple(dict.fromkeys(rungs))


def _widths() -> list[int]:
    steps = ((32, 64, 32), (64, 1024, 64), (1024, 2048, 128), (2048, 4096, 256), (4096, 8192, 512), (8192, 16385, 1024))
    return [width for low, high, step in steps for width in range(low, high, step)]


def _depth(table: tuple[tuple[int, int], ...], width: int) -> float:
    at = min(max(bisect_left(table, (width, 0)), 1), len(table) - 1)
    (narrow, few), (wide, many) = table[at - 1], table[at]
    part = min(max(log(width / narrow) / log(wide / narrow), 0.0), 1.0)
    return float(few * (many / few) ** part)


_UNIT_NORM = RMSNorm(unit_offset=True)

_UNIT_NORMS = {"norm": _UNIT_NORM, "residual": Residual(norm=_UNIT_NORM)}
"""A hybrid is Qwen3-Next's in every convention that costs nothing, so that its class and its kernels run the design."""


@lru_cache(maxsize=4096)
def build_spec(style: Style, shape: Shape) -> ModelSpec:
    """The model of a rung, from real blocks."""
    pattern, blocks = _PARTS[style.family](style, shape)
    return ModelSpec(
        name=style.family,
        hidden_size=shape.width,
        vocab_size=min(style.vocab_size, 32768) if shape.width < TIED_BELOW else style.vocab_size,
        tie_word_embeddings=shape.width < TIED_BELOW,
        blocks=blocks,
        layers=pattern,
        **(_UNIT_NORMS if style.family == "hybrid" else {}),
    )


def dense_equivalent(spec: ModelSpec) -> float:
    """Parameters of the dense model that a model with experts is about as good as, sqrt(total · active): a proxy."""
    parameters = spec.parameters()
    return sqrt(parameters.total * parameters.active)


def _attention(style: Style, width: int, window: int | None = None) -> Attention:
    """Grouped-query attention with heads of 128 channels from 1024 on, of 64 below, of 32 in the smallest models.

    Eight key heads (Llama 3) from 2048 on, four below. A model of experts has few (Qwen3-30B-A3B: 4), since its cache would
    else outgrow its active weights, and a hybrid fewer (Nemotron 3 Nano, Qwen3-Next: 2).
    """
    if width >= 1024:
        heads, dim = 8 * ceil(width / 1024), 128
        groups = _key_heads(style, width)
    else:
        dim = 64 if width >= 64 else 32
        groups = 1 if width < 256 else 2 if width < 768 or style.family == "hybrid" else 4
        heads = max(1, width // dim // groups) * groups
    return Attention(
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=dim, qk_norm="head", sliding_window=window
    )


def _gated_attention(style: Style, width: int) -> Attention:
    """As Qwen3-Next has it: a sigmoid on what each head found (Qiu et al., arXiv 2505.06708), a quarter of it turned."""
    gated = {"output_gate": True, "qk_norm_unit_offset": True, "rope": Rope(partial_rotary_factor=0.25)}
    return _attention(style, width, style.window).model_copy(update=gated)


def _key_heads(style: Style, width: int) -> int:
    """Key heads of a model of 1024 channels or more."""
    if style.family == "hybrid":
        return 2 if width < 3072 else 4 if width < 8192 else 8
    return 4 if width < (4096 if style.experts else 2048) else 8


def _channel(style: Style, width: int) -> Block:
    """A gated MLP of 3.5 widths (Llama 3), or experts that together are 3 widths wide for each token (Qwen 3).

    A hybrid has one more for every token, behind a gate (Qwen3-Next).
    """
    if not style.experts:
        return GatedMLP(intermediate_size=_round(3.5 * width, 256 if width >= 1024 else 32))
    shared = style.family == "hybrid"
    inner = _round(3 * width / (style.chosen + shared), 64 if width >= 512 else 32)
    return MoE(
        num_experts=style.experts,
        num_experts_per_tok=style.chosen,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner if shared else 0,
        shared_expert_gate=shared,
    )


def _mamba(width: int) -> Mamba2:
    """Twice the width inside, heads of 64 channels, state of 128 rows (64 in small models).

    Its norm's epsilon is the model's: HF's Mamba-2 has one for all.
    """
    dim = 64 if width >= 64 else 32
    state = 128 if width >= 512 else 64
    return Mamba2(num_heads=2 * width // dim, head_dim=dim, state_size=state, norm_eps=RMSNorm().eps)


def _delta(width: int) -> GatedDeltaNet:
    """Qwen3-Next's proportions: value heads twice the key heads, all of 128 channels (64 in small models)."""
    dim = 128 if width >= 1024 else (64 if width >= 128 else 32)
    keys = max(1, width // dim)
    return GatedDeltaNet(num_key_heads=keys, num_value_heads=2 * keys, key_head_dim=dim, value_head_dim=dim)


def _attentive(style: Style, shape: Shape) -> tuple[str, dict[str, Block]]:
    channel = "experts" if style.experts else "mlp"
    blocks = {"attention": _attention(style, shape.width), channel: _channel(style, shape.width)}
    if style.window is None:
        return f"{shape.layers}*(attention {channel})", blocks
    blocks["window"] = _attention(style, shape.width, style.window)
    if not style.full_every:
        del blocks["attention"]
        return f"{shape.layers}*(window {channel})", blocks
    return _interleaved("window", "attention", channel, shape.layers, min(style.full_every, shape.layers)), blocks


def _recurrent(style: Style, shape: Shape) -> tuple[str, dict[str, Block]]:
    return f"{shape.layers}*(mamba)", {"mamba": _mamba(shape.width)}


def _mixed(style: Style, shape: Shape) -> tuple[str, dict[str, Block]]:
    channel = "experts" if style.experts else "mlp"
    blocks = {
        "delta": _delta(shape.width),
        "attention": _gated_attention(style, shape.width),
        channel: _channel(style, shape.width),
    }
    return _interleaved("delta", "attention", channel, shape.layers, style.period), blocks


def _interleaved(often: str, seldom: str, channel: str, layers: int, period: int) -> str:
    """`period - 1` layers of one mixer, then one of the other, again and again; what is left over is of the first."""
    unit = " | ".join([f"{often} {channel}"] * (period - 1) + [f"{seldom} {channel}"])
    rest = " | ".join([f"{often} {channel}"] * (layers % period))
    whole = f"{layers // period}*({unit})"
    return f"{whole} | {rest}" if rest else whole


_PARTS = {"transformer": _attentive, "moe": _attentive, "ssm": _recurrent, "hybrid": _mixed}


def _round(value: float, step: int) -> int:
    return max(step, ceil(value / step) * step)
