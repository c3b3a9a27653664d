"""What of each family's shape the workload decides: experts, the share of attention, windows, the vocabulary.

Nothing here looks at how much memory there is: with more of it a family grows and never changes its style.
"""

from __future__ import annotations

from dataclasses import replace

from archcompass.advisor.reading import Reading
from archcompass.advisor.sizing.shapes import FAMILIES, Family, Style

VOCABULARY = {"text": 131072, "code": 131072, "logs": 4096, "audio": 4096, "images": 8192, "video": 8192}
"""Tokens by modality. Signals have few: a byte or a bin of a value (256), a template of a log line, a code of a codec."""

STREAM_WINDOW = 4096
"""Keys a windowed layer keeps of a stream (Mistral, Gemma 3: 1,024 to 4,096)."""

WINDOW = 1024
"""Keys of the window layers of a long-context transformer, five of six layers (Gemma 3: cache share from 60 % to 15 %)."""

WINDOW_PERIOD = 6
"""One full layer in so many of a windowed transformer (Gemma 3); as many as a hybrid has where recall matters."""

EXACT_PERIOD, LEAN_PERIOD = 4, 8
"""Layers per attention layer: 1/4 where recall matters (arXiv 2507.06457 recommends 3:1 to 6:1), 1/8 where it does not (loss is
lowest at 8 %, arXiv 2406.07887; Jamba takes 1:7)."""


ROOMY_BYTES = 4e10
"""Memory that holds about 30B in 8 bits beside some caches: below it a dense model is the better use of the memory."""

BUSY = 0.5
"""Share of a token's time that a usual dense model would spend on the others' prompts, beyond which arithmetic is scarce."""

LARGE_MACHINE_BYTES = 2e11
"""Memory beyond which a dense model would be larger than any that is still made (about 120B)."""


def styles(reading: Reading) -> dict[Family, Style]:
    """The style of each family for this workload."""
    return {family: style(family, reading) for family in FAMILIES}


def style(family: Family, reading: Reading) -> Style:
    """The style of one family."""
    vocabulary = VOCABULARY.get(reading.workload.modality, 256) if reading.signal > 0.0 else 131072
    if family == "ssm":
        return Style(family="ssm", vocab_size=vocabulary)
    window, full = windows(family, reading)
    experts, chosen = (
        experts_of(reading) if family == "moe" or (family == "hybrid" and wants_experts(reading)) else (0, 0)
    )
    return Style(
        family=family,
        vocab_size=vocabulary,
        experts=experts,
        chosen=chosen,
        period=attention_period(reading) if family == "hybrid" else 0,
        window=window,
        full_every=full,
    )


def attention_period(reading: Reading) -> int:
    """One attention layer in so many layers of a hybrid."""
    return EXACT_PERIOD if reading.recall >= 0.8 else LEAN_PERIOD


def wants_experts(reading: Reading) -> bool:
    """Whether a hybrid's channel mixers are experts: for facts, for many users or their prompts, on large machines, with little
    bandwidth."""
    if reading.signal > 0.5 or reading.workload.mode == "finetuning" or reading.card.total_memory_bytes < 16e9:
        return False
    roomy = reading.card.total_memory_bytes > ROOMY_BYTES
    large = reading.card.total_memory_bytes > LARGE_MACHINE_BYTES
    many = reading.open_ended and (reading.workload.concurrency >= 64 or (reading.reading_share > BUSY and roomy))
    return large or many or reading.closed_book >= 0.3 or reading.card_is_poor > 0.5


def experts_of(reading: Reading) -> tuple[int, int]:
    """(routed experts, chosen per token).

    128 of which 8 (Qwen3-30B-A3B: total ten times active); 4 of them where bandwidth is scarce or experts may lie in system
    memory (gpt-oss-120b: 23 times); 64 for narrow subjects, whose facts are few; 16 for signals.
    """
    if reading.signal > 0.5:
        return 16, 2
    if reading.card_is_poor > 0.5 or reading.experts_may_wait:
        return 128, 4
    return (64, 8) if reading.workload.breadth == "narrow" else (128, 8)


def windows(family: Family, reading: Reading) -> tuple[int | None, int]:
    """(window, one full layer in so many). A stream leaves attention only a window, unless it must be quoted from."""
    if reading.workload.unbounded and (reading.signal > 0.5 or reading.recall < 0.8):
        return STREAM_WINDOW, 0
    if family != "hybrid" and reading.signal <= 0.5 and (reading.tall > 0.5 or reading.heavy > 0.25):
        return WINDOW, full_every(reading)
    return None, 0


def full_every(reading: Reading) -> int:
    """One full layer in so many of a windowed transformer."""
    return EXACT_PERIOD if reading.recall >= 0.8 else WINDOW_PERIOD


def leaner(style: Style, reading: Reading) -> Style:
    """The same family in the style that keeps the least: windows for attention, no experts for a hybrid."""
    if style.family == "hybrid":
        return replace(style, experts=0, chosen=0)
    if style.family in ("transformer", "moe") and style.window is None:
        return replace(style, window=WINDOW, full_every=full_every(reading))
    return style
