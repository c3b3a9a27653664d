"""The search for a size: the highest rung of a ladder that fits the memory, meets the times and is not beyond need.

Along a ladder memory and times only grow, so bisection finds it. The size is found in the smallest precision allowed; then the
best precision that this size still fits is taken, which may reach higher where arithmetic was the bound. A larger model in 4
bits beats a smaller one in 8 (arXiv 2411.02355), and more memory can only raise first the size and then the precision.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from math import inf, isfinite

from archcompass.advisor.reading import THINKING
from archcompass.advisor.sizing.adapters import adapter_memory, days_allowed, training_days
from archcompass.advisor.sizing.ask import LEAST_PARAMETERS, LEAST_SIGNAL_PARAMETERS, Ask
from archcompass.advisor.sizing.placement import first_token, is_worth, layouts, placed
from archcompass.advisor.sizing.shapes import Shape, Style, build_spec, dense_equivalent, ladder
from archcompass.advisor.sizing.styles import leaner
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.ledger import Memory, memory
from archcompass.profiles.predict import Prediction, predict
from archcompass.profiles.request import Request


@dataclass(frozen=True, kw_only=True)
class Times:
    """What the predictor says of a model that fits.

    Attributes:
        first_token: one prompt alone.
        load: all sequences together.
    """

    first_token: Prediction | None
    load: Prediction

    @property
    def first_token_ms(self) -> float | None:
        """Time of one prompt."""
        return self.first_token.prefill_ms if self.first_token else None

    @property
    def step_ms(self) -> float | None:
        """Time of one token for every sequence."""
        return self.load.decode_ms_per_token

    def paced_ms(self, ask: Ask) -> float | None:
        """Time of one token for every sequence while the others' prompts are read in between.

        Each of them comes once in `THINKING` times the `output` tokens of an answer, and only what is new in it is read.
        One's own is read before the first token.
        """
        prompts, work = self.load.prefill_ms, ask.reading.workload
        if self.step_ms is None or prompts is None or work.stream:
            return self.step_ms
        others = 1.0 - 1.0 / work.concurrency
        return self.step_ms + others * prompts * ask.reading.new_share / (THINKING * work.output)


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A family, sized.

    Attributes:
        style, shape, spec: what it is.
        precision: how its weights are stored.
        request: the load it was sized for: how several cards share it, what lies in system memory.
        memory: its ledger.
        fits: whether the memory holds it, the margin left free.
        times: None when it does not fit.
        misses: a time limit it does not meet, and by what factor.
        bound: what stopped it from being larger: "memory", "time", "need", "ladder", or "stopgap" where it only stands in for
            a better family that does not fit.
        last_resort: whether its precision is one the evidence speaks against here.
    """

    style: Style
    shape: Shape
    spec: ModelSpec
    precision: str
    request: Request
    memory: Memory
    fits: bool
    times: Times | None
    misses: dict[str, float] = field(default_factory=dict)
    bound: str = "memory"
    last_resort: bool = False


def size(style: Style, ask: Ask, most: float = inf) -> Sized:
    """The biggest model of a style that fits and meets the times, in the layout that holds more; the smallest useful one when
    none does.

    Args:
        most: parameters beyond which it must not grow, were there room, even where that is below what is of use.
    """
    if most < total_parameters(style, useful(style, ask)[0]):
        return _below(style, ask, most)
    found = [_size(style, each, useful(style, each), most) for each in layouts(ask)[:1]]
    found += [_size(style, each, rungs, most) for each in layouts(ask)[1:] if (rungs := _worthy(style, each))]
    return max(found, key=_worth)


def least(style: Style, ask: Ask) -> int:
    """Parameters of the smallest useful model of a style, in any way that could be taken."""
    return min(total_parameters(plain, useful(plain, ask)[0]) for plain, _ in resorts(style, ask))


def _below(style: Style, ask: Ask, most: float) -> Sized:
    """The largest model of a style that is no larger than `most`, in the first way that fits."""
    for each in layouts(ask):
        for plain, precision in resorts(style, each):
            rungs = ladder(plain)
            shape = rungs[max(0, bisect_right(rungs, most, key=lambda shape: total_parameters(plain, shape)) - 1)]
            if fits(plain, shape, each, precision):
                return _finish(plain, shape, each, precision, "stopgap", last_resort=precision == each.last_resort)
    return _smallest(style, ask)


def _worthy(style: Style, ask: Ask) -> tuple[Shape, ...]:
    """The useful rungs for which this layout is worth its trouble: the lower ones, since wide models have many heads."""
    return tuple(takewhile(lambda shape: is_worth(build_spec(style, shape), ask), useful(style, ask)))


def _worth(sized: Sized) -> tuple[bool, int, float]:
    """What makes one layout better than another: that it fits, the size it holds, and how soon a token comes."""
    step = sized.times.step_ms if sized.times else None
    return (sized.fits, sized.spec.parameters().total, -(step or 0.0))


def _size(style: Style, ask: Ask, rungs: tuple[Shape, ...], ceiling: float) -> Sized:
    precision = ask.precisions[0]
    if not fits(style, rungs[0], ask, precision):
        return _smallest(style, ask)
    most = min(ask.most_parameters, ceiling)
    within_need = (
        _last(rungs, lambda shape: total_parameters(style, shape) <= most) if isfinite(most) else len(rungs) - 1
    )
    in_memory = _last(rungs[: within_need + 1], lambda shape: fits(style, shape, ask.grown, precision))
    enough = DECENT_PARAMETERS[ask.kind]
    decent = _last(rungs[: in_memory + 1], lambda shape: dense_equivalent(build_spec(style, shape)) <= enough)
    ease = easing(style, rungs[decent], ask, precision)
    in_time = _last(rungs[: in_memory + 1], lambda shape: in_times(style, shape, ask, precision, ease))
    bound = "time" if in_time < in_memory else "memory" if in_memory < within_need else "need"
    if bound == "need" and within_need == len(rungs) - 1:
        bound = "ladder"
    if bound == "need" and ceiling < ask.most_parameters:
        bound = "stopgap"
    best, precision = _better_precision(style, rungs[in_time : within_need + 1], ask, ease, grows=bound == "time")
    return _finish(style, best, ask, precision, bound)


def fits_at_all(style: Style, ask: Ask) -> bool:
    """Whether the smallest useful model of a style fits, in any way that could be taken."""
    return any(
        fits(plain, least, each, precision)
        for each in layouts(ask)
        for plain, precision in resorts(style, each)
        if is_worth(build_spec(plain, least := useful(plain, each)[0]), each)
    )


def resorts(style: Style, ask: Ask) -> list[tuple[Style, str]]:
    """Ways to make the smallest model of a style, the best first: as asked, in a leaner style, in fewer bits."""
    styles = list(dict.fromkeys([style, leaner(style, ask.reading)]))
    precisions = [ask.precisions[0], *([ask.last_resort] if ask.last_resort else [])]
    return [(plain, precision) for plain in styles for precision in precisions]


@lru_cache(maxsize=256)
def _useful(style: Style, least: float) -> tuple[Shape, ...]:
    rungs = ladder(style)
    return rungs[bisect_left(rungs, least, key=lambda shape: total_parameters(style, shape)) :]


def useful(style: Style, ask: Ask) -> tuple[Shape, ...]:
    """Rungs from the smallest model that is of use."""
    if ask.kind == "signal":
        return _useful(style, LEAST_SIGNAL_PARAMETERS)
    return _useful(style, LEAST_PARAMETERS["hybrid with experts" if style.period and style.experts else style.family])


def total_parameters(style: Style, shape: Shape) -> int:
    """Parameters of a rung, idle experts included."""
    return build_spec(style, shape).parameters().total


def fits(style: Style, shape: Shape, ask: Ask, precision: str) -> bool:
    """Whether the fullest card holds its part and keeps the margin."""
    return ledger(style, shape, ask, precision).per_card_bytes <= ask.capacity_bytes


def ledger(style: Style, shape: Shape, ask: Ask, precision: str) -> Memory:
    """Memory of a rung under the whole load."""
    if ask.reading.workload.mode == "finetuning":
        return adapter_memory(build_spec(style, shape), ask.request(precision), ask.hardware)
    return _ledger(style, shape, lies(style, shape, ask, precision), ask.hardware)


def lies(style: Style, shape: Shape, ask: Ask, precision: str) -> Request:
    """The whole load, as a rung lies on the machine."""
    return placed(
        build_spec(style, shape), ask, precision, lambda request: _ledger(style, shape, request, ask.hardware)
    )


def held_by(spec: ModelSpec, ask: Ask, precision: str) -> tuple[Memory, Request]:
    """Memory of any model under the whole load, and how it lies on the machine: in the first layout that fits."""
    if ask.reading.workload.mode == "finetuning":
        request = ask.request(precision)
        return adapter_memory(spec, request, ask.hardware), request
    found = []
    for each in layouts(ask):
        request = placed(spec, each, precision, lambda request: memory(spec, request, ask.hardware))
        found.append((memory(spec, request, ask.hardware), request))
        if found[-1][0].per_card_bytes <= ask.capacity_bytes:
            return found[-1]
    return found[0]


@lru_cache(maxsize=4096)
def _ledger(style: Style, shape: Shape, request: Request, hardware: Hardware) -> Memory:
    return memory(build_spec(style, shape), request, hardware)


DECENT_PARAMETERS = {"language": 1.03e10, "signal": 1e5}
"""Dense-equivalent parameters, sqrt(total · active), below which a limit that nobody asked for is not worth shrinking the model
any more: 10B, or 29B with experts of which 3.6B are active, as most open hybrids are made."""


def easing(style: Style, decent: Shape, ask: Ask, precision: str) -> float:
    """How far limits that nobody asked for must give way for a decent model to meet them."""
    if not ask.serves:
        return 1.0
    missed = misses(times(style, decent, ask.slowest, precision), ask)
    return max((factor for limit, factor in missed.items() if not ask.is_users_own(limit)), default=1.0)


def in_times(style: Style, shape: Shape, ask: Ask, precision: str, ease: float = 1.0) -> bool:
    """Whether a rung that fits meets the times; when it is trained, whether that ends in time."""
    if not ask.serves:
        return training_days(build_spec(style, shape), ask) <= days_allowed(ask)
    if ask.first_token_ms is None and ask.step_ms is None:
        return True
    load = Times(first_token=None, load=_predict(style, shape, lies(style, shape, ask, precision), ask.hardware))
    if not load.load.fits or misses(load, ask, ease, surely=True):
        return False
    return not misses(times(style, shape, ask, precision), ask, ease, surely=True)


def times(style: Style, shape: Shape, ask: Ask, precision: str) -> Times:
    """What the predictor says; the first token only where a limit asks for it."""
    request = lies(style, shape, ask, precision)
    load = _predict(style, shape, request, ask.hardware)
    if ask.first_token_ms is None:
        return Times(first_token=None, load=load)
    return Times(first_token=_predict(style, shape, first_token(request), ask.hardware), load=load)


@lru_cache(maxsize=1024)
def _predict(style: Style, shape: Shape, request: Request, hardware: Hardware) -> Prediction:
    return predict(build_spec(style, shape), request, hardware)


def misses(found: Times, ask: Ask, ease: float = 1.0, *, surely: bool = False) -> dict[str, float]:
    """Limits that are not met, and by what factor; those nobody asked for are `ease` times as wide.

    With `surely`, a limit that was asked for must hold at the slow end of the prediction's range: there is queueing, too.
    """
    slow = {"ttft_ms": found.load.high["prefill"], "step_ms": found.load.high["decode"]}
    limits = {
        "ttft_ms": (found.first_token_ms, _eased(ask.first_token_ms, ask.is_users_own("ttft_ms"), ease)),
        "step_ms": (found.paced_ms(ask), _eased(ask.step_ms, ask.is_users_own("step_ms"), ease)),
    }
    return {
        name: took / limit
        for name, (took, limit) in limits.items()
        if took is not None
        and limit is not None
        and took * (slow[name] if surely and ask.is_users_own(name) else 1.0) > limit
    }


def _eased(limit: float | None, asked: bool, ease: float) -> float | None:
    return limit if limit is None or asked else limit * ease


def _last(rungs: tuple[Shape, ...], holds: Callable[[Shape], bool]) -> int:
    """Index of the last rung for which `holds`, which once false stays false; 0 when it never holds."""
    if holds(rungs[-1]):
        return len(rungs) - 1
    low, high = 0, len(rungs) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(rungs[middle]) else (low, middle)
    return low


def _reach(rungs: tuple[Shape, ...], holds: Callable[[Shape], bool]) -> int:
    """As `_last`, for a rung that is near: steps of doubling length, then bisection."""
    low, step = 0, 1
    while low + step < len(rungs) and holds(rungs[low + step]):
        low, step = low + step, 2 * step
    return low + _last(rungs[low : low + step], holds)


def _better_precision(
    style: Style, rungs: tuple[Shape, ...], ask: Ask, ease: float, *, grows: bool
) -> tuple[Shape, str]:
    """The best precision in which the first rung still fits and meets the times, and the rung it reaches.

    Where time and not memory was the bound, a format with faster arithmetic may reach higher.
    """

    def holds(shape: Shape) -> bool:
        return fits(style, shape, ask.grown, precision) and in_times(style, shape, ask, precision, ease)

    for precision in reversed(ask.precisions[1:]):
        if holds(rungs[0]):
            return rungs[_reach(rungs, holds) if grows else 0], precision
    return rungs[0], ask.precisions[0]


def _smallest(style: Style, ask: Ask) -> Sized:
    """The smallest useful model in the first way that fits, else as what does not fit."""
    for plain, precision in resorts(style, ask):
        shape = useful(plain, ask)[0]
        if fits(plain, shape, ask, precision):
            return _finish(plain, shape, ask, precision, "memory", last_resort=precision == ask.last_resort)
    return Sized(
        style=plain,
        shape=shape,
        spec=build_spec(plain, shape),
        precision=precision,
        request=lies(plain, shape, ask, precision),
        memory=ledger(plain, shape, ask, precision),
        fits=False,
        times=None,
    )


def _finish(style: Style, shape: Shape, ask: Ask, precision: str, bound: str, last_resort: bool = False) -> Sized:
    spec = build_spec(style, shape)
    held = ledger(style, shape, ask, precision)
    found = times(style, shape, ask, precision) if ask.serves else None
    return Sized(
        style=style,
        shape=shape,
        spec=spec,
        precision=precision,
        request=lies(style, shape, ask, precision),
        memory=held,
        fits=True,
        times=found,
        misses=misses(found, ask) if found else {},
        bound=bound,
        last_resort=last_resort,
    )
