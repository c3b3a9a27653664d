"""Quantities an expert works out first: the cache of all users, the times, how much context is really used, and where the
cache outweighs the weights.

    T_speed = active weight bytes / (batch · cache bytes per token)          T* = constant state / cache bytes per token
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from archcompass.advisor.reading import Reading
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.search import Sized
from archcompass.advisor.sizing.shapes import Family
from archcompass.advisor.units import say_bytes, say_ms, say_tokens
from archcompass.blocks.precision import precision

HONEST_TOKENS = 2**20
"""Longest context for which any published model was tested and held: 1M (RULER at 1M: 80 to 86 for the best hybrids)."""

LOAD_IT_ALL_TOKENS = 200_000
"""An archive below this is read whole rather than searched."""

USED_SHARE = {"lookup": (0.6, 0.7), "reasoning": (0.1, 0.2)}
"""Share of the advertised context that is used well: one or a few facts looked up, or several combined (RULER, NoLiMa)."""


class Quantity(NamedTuple):
    """One derived number.

    Attributes:
        name: as the field calls it.
        value, low, high: best estimate and interval, in `unit`; None where it does not apply.
        unit: "bytes", "seconds", "tokens", "tokens_per_second" or "".
        text: what it means here, in a sentence.
        source: how it was found.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    unit: str
    text: str
    source: str


def cache_bytes_per_token(sized: Sized, ask: Ask) -> float:
    """Bytes that one more token of one sequence keeps."""
    step = ask.request(sized.precision).step(1, ask.prompt)
    longer = ask.request(sized.precision).step(1, ask.prompt + 1)
    return sized.spec.state_bytes(longer) - sized.spec.state_bytes(step)


def constant_state_bytes(sized: Sized, ask: Ask) -> float:
    """Bytes of state that one sequence keeps however long it is."""
    step = ask.request(sized.precision).step(1, 0)
    kept = [(n, tensor) for _, n, tensors in sized.spec.state(1) for tensor in tensors if not tensor.grows]
    return sum(n * tensor.bytes(step) for n, tensor in kept)


def t_speed(sized: Sized, ask: Ask) -> float | None:
    """Tokens per sequence at which the caches of all sequences equal the active weights; None when nothing grows."""
    growth = cache_bytes_per_token(sized, ask)
    if growth <= 0:
        return None
    active = precision(sized.precision).bytes(sized.spec.parameters().active)
    return active / (ask.reading.workload.concurrency * growth)


def derived(ask: Ask, sizes: Mapping[Family, Sized]) -> tuple[Quantity, ...]:
    """The quantities for this workload; those of a model are the sized ones'."""
    reading, attention = ask.reading, sizes["transformer"]
    found: list[Quantity | None] = [_total_cache(ask, attention), _used_context(reading)]
    found += [_t_speed(ask, attention), _t_star(ask, attention, sizes["hybrid"])]
    return (*[quantity for quantity in found if quantity is not None], *_times(ask, sizes))


def _total_cache(ask: Ask, attention: Sized) -> Quantity:
    work, growth = ask.reading.workload, cache_bytes_per_token(attention, ask)
    total, small = attention.memory.state_bytes, _is_small(attention)
    return Quantity(
        name="total KV",
        value=total,
        low=total if small else total * 0.5,
        high=total * 2 if small else total,
        unit="bytes",
        text=f"{work.concurrency:,} sequences of {say_tokens(ask.prompt)} tokens keep {say_bytes(total)} in the transformer's "
        f"cache ({say_bytes(growth)} a token); {'16-bit caches double it' if small else '8-bit caches halve it'}",
        source="memory ledger",
    )


def _is_small(sized: Sized) -> bool:
    """Whether its cache is kept in 8 bits already."""
    return sized.request.kv_precision == "fp8"


def _used_context(reading: Reading) -> Quantity:
    kind = "reasoning" if reading.reasoning >= 0.5 else "lookup"
    low, high = USED_SHARE[kind]
    length = min(reading.context, HONEST_TOKENS)
    what = "several facts are combined" if kind == "reasoning" else "facts are looked up"
    return Quantity(
        name="effective context",
        value=length * (low + high) / 2,
        low=length * low,
        high=length * high,
        unit="tokens",
        text=f"of {say_tokens(reading.workload.context)} tokens a model that claims just that uses about "
        f"{say_tokens(int(length * low))} to {say_tokens(int(length * high))} well when {what}; take one that claims more",
        source="RULER, NoLiMa, MRCR",
    )


def _t_speed(ask: Ask, attention: Sized) -> Quantity | None:
    where = t_speed(attention, ask)
    if where is None:
        return None
    count = ask.reading.workload.concurrency
    beyond = "past it" if ask.prompt > where else "below it"
    return Quantity(
        name="T_speed",
        value=where,
        low=where * (0.4 if _is_small(attention) else 0.8),
        high=where * (1.25 if _is_small(attention) else 2.0),
        unit="tokens",
        text=f"with {count:,} sequences the caches outweigh the transformer's active weights from "
        f"{say_tokens(int(where))} tokens each; your {say_tokens(ask.prompt)} are {beyond}",
        source="weight bytes / (batch · cache bytes per token); "
        + ("low end: 16-bit cache" if _is_small(attention) else "high end: 8-bit cache"),
    )


def _t_star(ask: Ask, attention: Sized, hybrid: Sized) -> Quantity | None:
    growth = cache_bytes_per_token(attention, ask)
    if growth <= 0:
        return None
    where = constant_state_bytes(hybrid, ask) / growth
    return Quantity(
        name="T*",
        value=where,
        low=where * 0.5,
        high=where * 2.0,
        unit="tokens",
        text=f"the hybrid's constant state is as large as {say_tokens(int(where) or 1)} tokens of the transformer's cache; "
        "shorter sequences would take less memory in the transformer",
        source="state bytes / cache bytes per token",
    )


def _times(ask: Ask, sizes: Mapping[Family, Sized]) -> list[Quantity]:
    found = []
    for family, sized in sizes.items():
        if sized.times is None:
            continue
        load = sized.times.load
        first = (sized.times.first_token or load).prefill_ms
        if first is not None:
            seconds = first / 1e3
            low, high = seconds * load.low["prefill"], seconds * load.high["prefill"]
            text = f"{say_tokens(ask.prompt)} tokens are read in {_between(seconds, low, high)} by the {family}"
            found.append(_timed(f"prefill seconds, {family}", seconds, low, high, "seconds", text, load.source))
        if load.decode_ms_per_token is not None:
            rate = 1e3 / load.decode_ms_per_token
            low, high = rate / load.high["decode"], rate / load.low["decode"]
            seen = f"{rate:.3g} tokens/s ({low:.3g} to {high:.3g})"
            text = f"each of {ask.reading.workload.concurrency:,} users sees {seen} from the {family}"
            found.append(_timed(f"decode per user, {family}", rate, low, high, "tokens_per_second", text, load.source))
    return found


def _between(seconds: float, low: float, high: float) -> str:
    return f"{say_ms(1e3 * seconds)} ({say_ms(1e3 * low)} to {say_ms(1e3 * high)})"


def _timed(name: str, value: float, low: float, high: float, unit: str, text: str, source: str) -> Quantity:
    return Quantity(name=name, value=value, low=low, high=high, unit=unit, text=text, source=source)
