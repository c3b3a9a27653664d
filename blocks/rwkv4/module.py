"""RWKV-4 at work. One forward serves prompts, further segments and single steps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.runtime import BlockModule, BlockState, Context, FixedState, Linear, at_once
from archcompass.blocks.rwkv4.spec import SEGMENT, ChannelMix, RWKV4TimeMix
from archcompass.blocks.time_mixing import ShiftState, hide, keeps, previous, wide
from archcompass.kernels.diagonal_scan import diagonal_scan

NOTHING = -1e38  # the exponent of an empty sum, and the key of a token that must not count

Sums = tuple[Tensor, Tensor, Tensor]  # numerator and denominator, both divided by e^m, and m, [batch, channels] each


@dataclass(slots=True)
class RWKV4State(FixedState):
    """shift [batch, width] and, float32, [batch, channels] each, the two sums divided by e^exponent."""

    shift: Tensor
    numerator: Tensor
    denominator: Tensor
    exponent: Tensor


class RWKV4TimeMixModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The rows of `mix` are μ of key, value and receptance."""

    spec: RWKV4TimeMix

    def __init__(self, spec: RWKV4TimeMix, width: int) -> None:
        super().__init__(spec, width)
        channels = spec.channels(width)
        self.mix = nn.Parameter(torch.empty(3, width))
        self.decay = nn.Parameter(torch.empty(channels))
        self.bonus = nn.Parameter(torch.empty(channels))
        self.key, self.value, self.receptance = (Linear(width, channels) for _ in range(3))
        self.output = Linear(channels, width)

    def reset_parameters(self) -> None:
        """Shares of the current token that rise over the channels, decays from slow to fast (the authors' start)."""
        with torch.no_grad():
            self.mix.copy_(torch.linspace(0, 1, self.width).expand(3, -1))
            self.decay.copy_(torch.linspace(-5, 3, len(self.decay)))
        nn.init.zeros_(self.bonus)

    def read_together(self) -> tuple[tuple[Linear, ...]]:
        return ((self.key, self.value, self.receptance),)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        before = state if isinstance(state, RWKV4State) else None
        x = hide(x, context)
        shifted = previous(x, None if before is None else before.shift)
        k, v, r = at_once(*self.read_together(), torch.lerp(shifted, x, self.mix.view(3, 1, 1, -1)))
        k = self._only_real(wide(k), context)
        means = self._mean_of_one if k.shape[1] == 1 else self._means
        mean, sums = means(k, v, *self._first_sums(k, before))
        y = self.output(r.sigmoid() * mean.to(x.dtype))
        return y, RWKV4State(x[:, -1].clone(), *sums) if keeps(context) else None

    def _only_real(self, k: Tensor, context: Context | None) -> Tensor:
        """Keys [batch, time, channels]; those of padding weigh nothing."""
        real = None if context is None else context.real(k.shape[1], k.device)
        return k if real is None else k.masked_fill(~real, NOTHING)

    def _first_sums(self, k: Tensor, before: RWKV4State | None) -> Sums:
        """Those before the first token."""
        if before is not None:
            return before.numerator.to(k.dtype), before.denominator.to(k.dtype), before.exponent.to(k.dtype)
        zero = k.new_zeros(k.shape[0], k.shape[2])
        return zero, zero, torch.full_like(zero, NOTHING)

    def _mean_of_one(
        self, k: Tensor, v: Tensor, numerator: Tensor, denominator: Tensor, m: Tensor
    ) -> tuple[Tensor, Sums]:
        """`_means` of a single token, which draws both sums towards (v, 1) by its share of all weights.

        The share of e^a in e^a + e^b is sigmoid(a - b). The sums of the next token are divided by the sum of the weights.
        """
        k, v, one = k.squeeze(1), wide(v).squeeze(1), torch.ones_like(denominator)
        faded = m - wide(self.decay).exp()
        seen, kept = (self.bonus + k - m).sigmoid(), (k - faded).sigmoid()
        y = torch.lerp(numerator, v, seen) / torch.lerp(denominator, one, seen)
        sums = torch.lerp(numerator, v, kept), torch.lerp(denominator, one, kept), torch.logaddexp(faded, k)
        return y.unsqueeze(1), sums

    def _means(self, k: Tensor, v: Tensor, numerator: Tensor, denominator: Tensor, m: Tensor) -> tuple[Tensor, Sums]:
        """wkv of many tokens [batch, time, channels], and the sums after the last."""
        sums, means = torch.stack([numerator, denominator], dim=1), []
        for some_k, some_v in zip(k.split(SEGMENT, dim=1), v.split(SEGMENT, dim=1), strict=True):
            mean, sums, m = self._weighted_mean(some_k, wide(some_v), sums, m)
            means.append(mean)
        numerator, denominator = sums.unbind(1)
        return torch.cat(means, dim=1), (numerator, denominator, m.clone())

    def _weighted_mean(self, k: Tensor, v: Tensor, sums: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """wkv of a segment, and the two sums [batch, 2, channels] and their exponent after its last token.

        All sums are kept divided by e^m, where m_t = max(m_{t-1} + w, k_t) is the largest exponent in them, so that no
        exponential is large. The quotient does not depend on m.
        """
        w, u = -wide(self.decay).exp(), wide(self.bonus)
        old, new = self._exponents(k.detach(), w.detach(), m)
        weight = (k - new).exp()
        seen, last = diagonal_scan(old + w - new, torch.stack([weight * v, weight], dim=2), initial_state=sums)
        numerator, denominator = torch.cat([sums.unsqueeze(1), seen[:, :-1]], dim=1).unbind(2)
        largest = torch.maximum(old, u + k)
        past, present = (old - largest).exp(), (u + k - largest).exp()
        y = (past * numerator + present * v) / (past * denominator + present)
        return y, last, new[:, -1]

    def _exponents(self, k: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """m before and after every token, [batch, time, channels]: m_t = w t + max(m_0, max_{i ≤ t}(k_i - w i)).

        Its rounding does no harm: any m near the largest exponent serves, as long as every sum is divided by the same.
        """
        fall = torch.arange(1, k.shape[1] + 1, device=k.device, dtype=k.dtype)[:, None] * w
        highest = torch.cummax(torch.cat([m.unsqueeze(1), k - fall], dim=1), dim=1).values
        new = highest[:, 1:] + fall
        return torch.cat([m.unsqueeze(1), new[:, :-1]], dim=1), new


class ChannelMixModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]. The rows of `mix` are μ of key and receptance."""

    def __init__(self, spec: ChannelMix, width: int) -> None:
        super().__init__(spec, width)
        self.mix = nn.Parameter(torch.empty(2, width))
        self.key = Linear(width, spec.intermediate_size)
        self.value = Linear(spec.intermediate_size, width)
        self.receptance = Linear(width, width)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.mix.copy_(torch.linspace(0, 1, self.width).expand(2, -1))

    def read_together(self) -> tuple[tuple[Linear, ...]]:
        return ((self.key, self.receptance),)

    def mixed(self, x: Tensor, shifted: Tensor) -> Tensor:
        """The inputs of key and receptance, [2, batch, time, width]: shares μ of x, the rest of the token before."""
        return torch.lerp(shifted, x, self.mix.view(2, 1, 1, -1))

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        x = hide(x, context)
        shifted = previous(x, state.shift if isinstance(state, ShiftState) else None)
        k, r = at_once(*self.read_together(), self.mixed(x, shifted))
        y = r.sigmoid() * self.value(F.relu(k).square())
        return y, ShiftState(x[:, -1].clone()) if keeps(context) else None


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of an RWKV-4 spec."""
    if isinstance(spec, RWKV4TimeMix):
        return RWKV4TimeMixModule(spec, width)
    assert isinstance(spec, ChannelMix)
    return ChannelMixModule(spec, width)
