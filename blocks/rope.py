"""Rotary position embedding (Su et al., arXiv 2104.09864) and its stretched forms: which angles, torch-free.

Pair i of a head's first R channels turns by `position · frequency_i`, with `frequency_i = theta^(−2i / R)` by default. The
others change the frequencies so that a model can read further than it was trained to:

- linear: all divided by `factor` (Chen et al., arXiv 2306.15595);
- dynamic: theta grows with the length once that passes the original one (NTK-aware scaling);
- yarn: slow pairs are divided by `factor`, fast ones are kept, with a ramp between (Peng et al., arXiv 2309.00071);
- llama3: the same idea, with the ramp over wavelengths (Llama 3.1, arXiv 2407.21783);
- longrope: every pair has its own divisor, one set up to the original length and one beyond (Ding et al., arXiv 2402.13753).

Field names are those of HF's `rope_parameters`.
"""

import math
from functools import cached_property, lru_cache
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from archcompass.errors import SpecError

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}
_ALLOWED: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "longrope": ("factor", "attention_factor"),
}
_ALWAYS = {"theta", "partial_rotary_factor", "interleaved", "rope_type"}


class Rope(BaseModel):
    """How positions turn queries and keys.

    Attributes:
        theta: base of the frequencies (HF `rope_theta`).
        partial_rotary_factor: share of each head's channels that turn.
        interleaved: pairs are neighbours (2i, 2i+1), as in GPT-J and DeepSeek, rather than halves (i, i + R/2).
        rope_type: how the frequencies are stretched.
        factor: by how much.
        original_max_position_embeddings: the length the frequencies were trained for.
        low_freq_factor, high_freq_factor: llama3; wavelengths above original/low are divided, below original/high kept.
        beta_fast, beta_slow: yarn; pairs that turn more often than beta_fast over the original length are kept, those that
            turn less often than beta_slow are divided.
        truncate: yarn; the ends of the ramp are rounded outward to whole pairs.
        mscale, mscale_all_dim: yarn; weights of the logarithm in the amplitude (DeepSeek).
        attention_factor: the amplitude itself, where it is not the type's own.
        short_factor, long_factor: longrope; one divisor per pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: PositiveFloat = 10000.0
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    interleaved: bool = False
    rope_type: RopeType = "default"
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: PositiveFloat | None = None
    short_factor: tuple[PositiveFloat, ...] | None = None
    long_factor: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def _fields_belong_to_the_type(self) -> Self:
        needed = _NEEDED[self.rope_type]
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise SpecError(f"rope_type {self.rope_type!r} needs {missing[0]}")
        odd = self.model_fields_set - _ALWAYS - set(needed) - set(_ALLOWED.get(self.rope_type, ()))
        if stray := sorted(name for name in odd if getattr(self, name) != type(self).model_fields[name].default):
            raise SpecError(f"{stray[0]} means nothing to rope_type {self.rope_type!r}; remove it")
        if self.short_factor and self.long_factor and len(self.short_factor) != len(self.long_factor):
            raise SpecError(
                f"short_factor has {len(self.short_factor)} entries and long_factor {len(self.long_factor)}; "
                "both have one per pair of channels that turn"
            )
        return self

    def rotary_dim(self, head_dim: int) -> int:
        """Channels of a head that turn.

        Raises:
            SpecError: the number is odd, and channels turn in pairs; or the longrope factors are of another number.
        """
        channels = int(head_dim * self.partial_rotary_factor)
        if channels % 2:
            raise SpecError(
                f"rope turns {channels} of head_dim {head_dim} channels; it must be even, as in {channels + 1}"
            )
        if self.long_factor is not None and len(self.long_factor) != channels // 2:
            raise SpecError(
                f"long_factor has {len(self.long_factor)} entries; {channels} channels make {channels // 2}"
            )
        return channels

    def inverse_frequencies(self, head_dim: int, length: int = 0) -> tuple[float, ...]:
        """[R / 2] radians per position. `length` tokens are in sight, which matters to dynamic and longrope alone."""
        return _frequencies(self, self.rotary_dim(head_dim), self.settled(length))

    def settled(self, length: int) -> int:
        """The part of `length` that the frequencies depend on: equal numbers, equal frequencies."""
        original = self.original_max_position_embeddings or 0
        if self.rope_type == "dynamic":
            return max(length, original)
        if self.rope_type == "longrope":
            return original + 1 if length > original else original
        return 0

    def __hash__(self) -> int:
        return self.fingerprint

    @cached_property
    def fingerprint(self) -> int:
        """The hash, taken once: a forward call looks its tables up by the rope, twice in every layer."""
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    @property
    def amplitude(self) -> float:
        """Factor on cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or 1.0
        if self.rope_type == "yarn":
            if self.mscale and self.mscale_all_dim:
                return yarn_scale(factor, self.mscale) / yarn_scale(factor, self.mscale_all_dim)
            return yarn_scale(factor)
        if self.rope_type == "longrope" and factor > 1:
            return math.sqrt(1 + math.log(factor) / math.log(self.original_max_position_embeddings or 2))
        return 1.0


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """How much sharper attention must be over a context `factor` times as long (yarn, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@lru_cache(maxsize=256)
def _frequencies(rope: Rope, channels: int, length: int) -> tuple[float, ...]:
    theta = rope.theta
    if rope.rope_type == "dynamic":
        factor, original = rope.factor or 1.0, rope.original_max_position_embeddings or 1
        theta *= (factor * length / original - (factor - 1)) ** (channels / max(channels - 2, 1))
    plain = tuple(theta ** (-2 * pair / channels) for pair in range(channels // 2))
    if rope.rope_type == "linear":
        return tuple(frequency / (rope.factor or 1.0) for frequency in plain)
    if rope.rope_type == "llama3":
        return tuple(_llama3(rope, frequency) for frequency in plain)
    if rope.rope_type == "yarn":
        return tuple(_yarn(rope, channels, pair, frequency) for pair, frequency in enumerate(plain))
    if rope.rope_type == "longrope":
        divisors = rope.long_factor if length > (rope.original_max_position_embeddings or 0) else rope.short_factor
        return tuple(frequency / divisor for frequency, divisor in zip(plain, divisors or (), strict=True))
    return plain


def _llama3(rope: Rope, frequency: float) -> float:
    """Kept where a wavelength fits the original length often enough, divided where it does not, blended between."""
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 1.0
    turns = (rope.original_max_position_embeddings or 1) * frequency / (2 * math.pi)
    if turns > high:
        return frequency
    divided = frequency / (rope.factor or 1.0)
    if turns < low or high == low:
        return divided
    kept = (turns - low) / (high - low)
    return (1 - kept) * divided + kept * frequency


def _yarn(rope: Rope, channels: int, pair: int, frequency: float) -> float:
    """Kept before the ramp, divided after it."""

    def pair_that_turns(times: float) -> float:
        reach = (rope.original_max_position_embeddings or 1) / (times * 2 * math.pi)
        return channels * math.log(reach) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last = last + 0.001 if first == last else last
    divided = min(max((pair - first) / (last - first), 0.0), 1.0)
    return frequency * (1 - divided) + frequency / (rope.factor or 1.0) * divided
