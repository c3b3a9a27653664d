"""Rotary position embedding (Su et al., arXiv 2104.09864): which angles, torch-free.

Pair i of a head's first `rotary_dim` channels turns by `position · inverse_frequency[i]`, with
`inverse_frequency[i] = theta^(−2i / rotary_dim)`.
"""

from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from archcompass.errors import SpecError


class Rope(BaseModel):
    """How positions turn queries and keys.

    Attributes:
        theta: base of the frequencies (HF `rope_theta`).
        partial_rotary_factor: share of each head's channels that turn.
        interleaved: pairs are neighbours (2i, 2i+1), as in GPT-J and DeepSeek, rather than halves (i, i + R/2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: PositiveFloat = 10000.0
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    interleaved: bool = False

    def rotary_dim(self, head_dim: int) -> int:
        """Channels of a head that turn.

        Raises:
            SpecError: the number is odd, and channels turn in pairs.
        """
        channels = int(head_dim * self.partial_rotary_factor)
        if channels % 2:
            raise SpecError(
                f"rope turns {channels} of head_dim {head_dim} channels; it must be even, as in {channels + 1}"
            )
        return channels

    def inverse_frequencies(self, head_dim: int) -> tuple[float, ...]:
        """[rotary_dim / 2] radians per position."""
        return _inverse_frequencies(self.theta, self.rotary_dim(head_dim))

    @property
    def amplitude(self) -> float:
        """Factor on cosine and sine."""
        return 1.0


@lru_cache(maxsize=64)
def _inverse_frequencies(theta: float, channels: int) -> tuple[float, ...]:
    return tuple(theta ** (-2 * pair / channels) for pair in range(channels // 2))
