"""What blocks do beside their products, measured where it happens: inside a sublayer whose products run for real.

Every linear layer is timed as it runs and taken off, so that what is small beside it is seen, and seen as it is in a model:
between products that have just driven everything else out of the caches. What is left is shared out among the block's own
operations in proportion to what they should cost. On an accelerator, whose kernels run behind the host's back, products
are left out instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from unittest.mock import patch

import torch

from archcompass.blocks.base import TINY_WIDTH, Block, Op, Step
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.runtime import BlockState, Context, Linear
from archcompass.profiles.efficiency import Curve, Efficiency, KindEfficiency, coordinates, scaled, seconds
from archcompass.profiles.measure import build
from archcompass.profiles.measure.clock import processor_clock, repeat
from archcompass.profiles.measure.products import COLD_BYTES, ballast, instance, share
from archcompass.profiles.predict import sublayer_work
from archcompass.profiles.request import Request

MEASURED_ALONE = ("gemm", "grouped_gemm", "attention")
"""Kinds whose curves come from `products`; all others are measured inside their block."""

LARGE = 2**18
"""Elements of a weight that drives something out of the caches; one of low rank does not."""

_SEEN = 0.3
"""Below this share of a block's time, what is not launches is noise."""


@dataclass(frozen=True)
class Parts:
    """Blocks of one machine in one dtype.

    Attributes:
        table: the curves of products, and of blocks measured before.
        tokens: lengths of prompts.
    """

    device: torch.device
    table: Efficiency
    name: str
    tokens: Sequence[int]

    def block(self, block: Block, width: int) -> dict[str, KindEfficiency]:
        """Efficiencies of the operations that only this block has; where their pace hangs on the size of its heads, over
        all the sizes it lists."""
        found = self._one_size(block, width)
        others = [self._one_size(other, width) for other in block.other_sizes()]
        return {name: _joined([kind, *(other[name] for other in others)]) for name, kind in found.items()}

    def _one_size(self, block: Block, width: int) -> dict[str, KindEfficiency]:
        """From the time of a block at several lengths."""
        request = Request(precision=self.name)
        steps = [request.step(1, 64), *(request.step(new) for new in self.tokens)]
        rests = [self.rest(alone(block, width), step, *self._sublayer(block, width, step)) for step in steps]
        launch = self._launch(block, rests[0])
        points: dict[str, list[_Point]] = {}
        for step, rest in zip(steps, rests, strict=True):
            left = rest.seconds - launch * rest.count
            if step.new_tokens > 1 and left < _SEEN * rest.seconds:
                continue
            factor = max(left, 0.02 * rest.seconds) / max(sum(wanted * op.count for op, wanted in rest.own), 1e-9)
            for op, wanted in rest.own:
                points.setdefault(op.name, []).append(_Point(step.new_tokens, op, wanted * factor))
        return {
            f"{block.kind}/{op_name}:{found[0].op.compute}": self._curves(found, launch)
            for op_name, found in points.items()
        }

    def _launch(self, block: Block, single: Rest) -> float:
        """Host seconds of one operation in a single step. Where nothing computes, a step has no bytes to speak of: all it
        takes is launches, over data that products have driven out of the caches. Where something does, they are those of a
        tiny block."""
        seen = single.seconds / max(single.count, 1)
        return min(self.launch(block), seen) if any(op.flops for op, _ in single.own) else seen

    def launch(self, block: Block) -> float:
        """Host seconds of one of the block's own operations: a step of a tiny block is nothing but launches."""
        small = type(block).tiny()[0]
        step = Request(precision=self.name).step(1, 8)
        try:
            rest = self.rest(alone(small, TINY_WIDTH), step, *self._sublayer(small, TINY_WIDTH, step))
        except (RuntimeError, ValueError):
            return 10e-6
        return max(1e-6, rest.seconds / max(rest.count, 1)) * 0.95

    def _sublayer(self, block: Block, width: int, step: Step) -> tuple[float, float]:
        """(seconds of one forward of the block with its norm and residual sum, less its linear layers; their FLOPs).

        Single steps find their code and weights as cold as in a model: layers are cycled, a block of another kind runs
        before each, and every product that is none of low rank drives out of the caches what one of ordinary size would; in
        a tiny block, all do. Layers share one context, as those of a model do.
        """
        spec, dtype, single = alone(block, width), build.DTYPES[self.name], step.new_tokens == 1
        weight_bytes = block.parameters(width).active * dtype.itemsize
        copies = max(1, min(8, COLD_BYTES // max(weight_bytes, 1))) if single else 1
        layers = [build.sublayer(spec, "block", self.device, dtype) for _ in range(copies)]
        x = torch.randn(step.batch, step.new_tokens, width, device=self.device).to(dtype)
        states: list[BlockState | None] = [None] * copies
        if step.past_tokens:
            past = torch.randn(step.batch, step.past_tokens, width, device=self.device).to(dtype)
            states = [layer(past, None, Context(embeddings=past))[1] for layer in layers]
        context = Context(past=step.past_tokens, embeddings=x)
        cold = single and self.device.type == "cpu"
        other = build.sublayer(alone(_unlike(block), width), "block", self.device, dtype) if cold else None

        def all_layers() -> None:
            for index, layer in enumerate(layers):
                if other is not None:
                    products.skip(lambda: other(x, None, Context(embeddings=x)))
                _, after = layer(x, states[index], context)
                states[index] = after if step.past_tokens else None

        with apart(self.device, evict_from=(LARGE if width > TINY_WIDTH else 0) if cold else None) as products:
            all_layers()
            flops = products.flops / copies
            spent = beside(all_layers, products, self.device, most=30)
        return spent / copies, flops

    def rest(self, spec: ModelSpec, step: Step, spent: float, product_flops: float) -> Rest:
        """What is left of `spent`, the seconds of a sublayer without products worth `product_flops`, for its own ops."""
        known, products, flops, own, count = 0.0, 0.0, 0.0, [], 0
        for _, op in sublayer_work(spec, "block", step):
            curves = self.table.of(op)
            peaks = self.table.peaks
            wanted = seconds(op, curves, peaks.get(op.compute, peaks["fp32"]), peaks["bandwidth"])
            whole = (wanted + curves.launch_seconds) * op.count
            if op.kind == "gemm":
                products, flops = products + whole, flops + op.flops * op.count
            elif op.kind in MEASURED_ALONE:
                known += whole
            else:
                own.append((op, wanted))
                count += op.count
        unseen = max(0.0, 1.0 - product_flops / flops) if flops else 0.0
        return Rest(max(spent - known - products * unseen, 0.02 * spent), own, count)

    def _curves(self, found: list[_Point], launch: float) -> KindEfficiency:
        """What computes is bound by bytes in single steps only, so a prompt's time says nothing of its bandwidth; what
        does not has one curve over bytes, and in a step nothing but its launch."""
        if any(point.op.flops for point in found):
            memory = Curve((1.0,), (1.0, 16.0), ((self._memory_share(found[0]), 1.0),))
        else:
            prompts = found[1:] or found
            memory = Curve.over(scaled({point.op.bytes: self._memory_share(point) for point in prompts}))
        peaks = self.table.peaks
        compute = scaled({
            coordinates(point.op)[0]: share(point.op.flops / peaks.get(point.op.compute, 1.0), point.seconds)
            for point in found if point.op.flops
        })  # fmt: skip
        return KindEfficiency(
            compute=Curve.over(compute, coordinates(found[-1].op)[1]) if compute else Curve.constant(1.0),
            memory=memory,
            launch_seconds=launch,
        )

    def _memory_share(self, point: _Point) -> float:
        return share(point.op.bytes / self.table.peaks["bandwidth"], point.seconds)


def _joined(kinds: Sequence[KindEfficiency]) -> KindEfficiency:
    """One op of a block of several sizes, of the first in all but what it computes."""
    curves = {kind.compute.y: kind.compute for kind in reversed(kinds)}
    return replace(kinds[0], compute=Curve.joined(list(curves.values())))


@dataclass(frozen=True)
class _Point:
    """One op at one length: how long it seems to have taken."""

    new_tokens: int
    op: Op
    seconds: float


@dataclass(frozen=True)
class Rest:
    """Seconds of a sublayer's own operations, each with what it should take, and how many there are."""

    seconds: float
    own: list[tuple[Op, float]]
    count: int


@dataclass
class Apart:
    """Linear layers told apart from the rest.

    Attributes:
        now: the clock.
        seconds: that they took since this was last set to zero; stays 0 where they are left out.
        flops: of all of them so far.
    """

    now: Callable[[], float]
    seconds: float = 0.0
    flops: float = 0.0
    pools: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def skip(self, call: Callable[[], object]) -> None:
        """Runs `call` and counts its time, but not its products, as if it were one of them."""
        start, seconds, flops = self.now(), self.seconds, self.flops
        call()
        self.seconds, self.flops = seconds + self.now() - start, flops

    def without(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """Ordinary numbers at once, in the place of a product."""
        shape = (*x.shape[:-1], layer.out_features)
        size = math.prod(shape)
        if x.dtype not in self.pools or self.pools[x.dtype].numel() < size:
            self.pools[x.dtype] = torch.randn(size, device=x.device).mul_(0.1).to(x.dtype)
        return self.pools[x.dtype][:size].view(shape)


@contextmanager
def apart(device: torch.device, evict_from: int | None = None) -> Iterator[Apart]:
    """Within it, linear layers are timed by themselves, or left out on an accelerator.

    Args:
        evict_from: with each product whose weight has at least so many elements, read four megabytes of memory besides, as the
            product with a weight of ordinary size would; None reads none.
    """
    now, plain = processor_clock(), Linear.forward
    found = Apart(now)
    other = None if evict_from is None else ballast()

    def forward(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        start = now()
        found.flops += 2.0 * math.prod(x.shape) * layer.out_features
        if device.type != "cpu":
            return found.without(layer, x)
        if other is not None and layer.weight.numel() >= (evict_from or 0):
            next(other).sum()
        y: torch.Tensor = plain(layer, x)
        found.seconds += now() - start
        return y

    with patch.object(Linear, "forward", forward):
        yield found


def beside(call: Callable[[], object], products: Apart, device: torch.device, most: int) -> float:
    """Median seconds of a call that has run before, less those of its products."""
    inside: list[float] = []

    def once() -> None:
        products.seconds = 0.0
        call()
        inside.append(products.seconds)

    times = repeat(once, device, seconds=0.15, least=3, most=most, warmups=0).runs
    return median(run * 1e-3 - taken for run, taken in zip(times, inside, strict=True))


def _unlike(block: Block) -> Block:
    """A block that does something else, of ordinary size."""
    return instance("attention", 4) if block.traits.role == "channel" else instance("gated_mlp", 4)


def alone(block: Block, width: int) -> ModelSpec:
    """A model of nothing but this block."""
    return ModelSpec(name="alone", hidden_size=width, vocab_size=64, layers="block", blocks={"block": block})
