"""How much of a machine's peak each kind of operation reaches: curves over shape, and what every kernel, layer and step costs.

    seconds(op) = max(flops / (peak · e_c), bytes / (bandwidth · e_m))

Efficiency is stored, not latency (DESIGN 7). e_c is a curve over two sizes of the op (see `coordinates`), e_m over the bytes
it moves. Between points the logarithm is interpolated, beyond them the edge is held: so a time never falls when its work
grows, as long as it does not at the points.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from archcompass.blocks.base import Op
from archcompass.errors import FileFormatError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Curve:
    """Efficiency over two sizes; a curve over one size has a single column.

    Attributes:
        x, y: sizes, ascending.
        values: one row per x, one column per y.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    @classmethod
    def constant(cls, value: float) -> Curve:
        """The same everywhere."""
        return cls((1.0,), (1.0,), ((value,),))

    @classmethod
    def joined(cls, curves: Sequence[Curve]) -> Curve:
        """Curves of one column each, side by side in the order of their second size."""
        columns = sorted(curves, key=lambda curve: curve.y)
        xs = tuple(sorted({x for curve in columns for x in curve.x}))
        ys = tuple(curve.y[0] for curve in columns)
        return cls(xs, ys, tuple(tuple(curve.at(x) for curve in columns) for x in xs))

    @classmethod
    def over(cls, points: Mapping[float, float], y: float = 1.0) -> Curve:
        """Over one size, where the other is `y`."""
        return cls(tuple(points), (y,), tuple((value,) for value in points.values()))

    def at(self, x: float, y: float = 1.0) -> float:
        """Interpolated in logarithms, held at the edges."""
        low, high, part = _between(self.x, x)
        left, right, share = _between(self.y, y)
        below = _mix(self.values[low][left], self.values[low][right], share)
        if low == high:
            return below
        return _mix(below, _mix(self.values[high][left], self.values[high][right], share), part)

    def covers(self, x: float, y: float = 1.0) -> bool:
        """Whether (x, y) lies inside the measured range, so that nothing is held at an edge."""
        inside_x = len(self.x) == 1 or self.x[0] <= x <= self.x[-1]
        return inside_x and (len(self.y) == 1 or self.y[0] <= y <= self.y[-1])


def _between(points: Sequence[float], value: float) -> tuple[int, int, float]:
    """Indices of the neighbours of `value` and how far it lies between them, in logarithms."""
    last = len(points) - 1
    if last == 0 or value <= points[0]:
        return 0, 0, 0.0
    if value >= points[last]:
        return last, last, 0.0
    high = bisect_right(points, value)
    low = high - 1
    return low, high, log(value / points[low]) / log(points[high] / points[low])


def _mix(first: float, second: float, part: float) -> float:
    if part == 0.0 or first == second:
        return first
    return float(first ** (1.0 - part) * second**part)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindEfficiency:
    """What one kind of operation reaches.

    Attributes:
        compute: share of the arithmetic peak, over `coordinates`.
        memory: share of the bandwidth, over (bytes moved, `new_tokens`).
        launch_seconds: host time to start one op of this kind (an op may be several kernels).
    """

    compute: Curve
    memory: Curve
    launch_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """A machine's efficiency table under one engine.

    Attributes:
        name: which machine and software it speaks of.
        source: "calibrated" when measured, "roofline" when taken from the literature.
        kinds: by op kind; "kind:compute" for a kind in one dtype; "block/op name:compute" for an op of one block.
        layer_seconds, step_seconds: constants per layer and per forward call.
        launches: seconds of starting one small kernel, "eager" and from a CUDA "graph"; empty where nothing is launched.
        overlaps: whether starting kernels runs ahead of the kernels themselves (accelerators), or adds to them.
        computes: the rate that everything runs at in 16 bits, where it is not that of its dtype (`hardware.FP16_SUMS`).
        peaks: measured FLOP/s by dtype and "bandwidth" that stand for the data sheet's, where there are any.
        spread: (low, high) factors on a predicted time, for prefill and decode.
        training: seconds of a training step over three times the forward pass, by "block:dtype", "head:dtype", and
            "gemm:dtype" for products of blocks that were not measured; 1 where nothing is known.
        made: versions, date and machine of a measurement.
    """

    name: str
    source: str
    kinds: Mapping[str, KindEfficiency] = field(hash=False)
    layer_seconds: float
    step_seconds: float
    overlaps: bool
    computes: str = ""
    peaks: Mapping[str, float] = field(default_factory=dict, hash=False)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    launches: Mapping[str, float] = field(default_factory=dict, hash=False)
    training: Mapping[str, float] = field(default_factory=dict, hash=False)
    made: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def of(self, op: Op, owner: str = "") -> KindEfficiency:
        """The curves that serve `op`: of this op in this block, of its kind in its dtype, of its kind, of elementwise work."""
        kinds = self.kinds
        found = (
            kinds.get(f"{owner}/{op.name}:{op.compute}") or kinds.get(f"{op.kind}:{op.compute}") or kinds.get(op.kind)
        )
        return found if found is not None else kinds["pointwise"]

    def trained(self, op: Op, owner: str) -> float:
        """Factor on the time of `op` of block `owner` in a training step."""
        known = self.training
        return known.get(f"{owner}:{op.compute}") or known.get(f"{op.kind}:{op.compute}") or 1.0


def seconds(op: Op, curves: KindEfficiency, rate: float, bandwidth: float) -> float:
    """Device time of one run of `op` on a machine of this peak rate and bandwidth, without its launch."""
    x, y = coordinates(op)
    computing = op.flops / (rate * curves.compute.at(x, y)) if op.flops else 0.0
    moved = op.bytes
    moving = moved / (bandwidth * curves.memory.at(moved, new_tokens(op))) if moved else 0.0
    return max(computing, moving)


def coordinates(op: Op) -> tuple[float, float]:
    """The two sizes that decide how well an op computes.

    Matrix products: (rows, elements of the weight); grouped ones: (rows per touched expert, elements of one expert's
    weight); attention: (new tokens, query heads per key head); the delta rule: (new tokens, elements of a head's state); all
    others: (`new_tokens`, FLOPs per one of them).
    """
    shape = op.shape
    if op.kind == "gemm" and len(shape) == 3:
        return float(shape[0]), float(shape[1] * shape[2])
    if op.kind == "grouped_gemm" and len(shape) == 4:
        return max(shape[0] / shape[3], 1.0), float(shape[1] * shape[2])
    if op.kind == "attention" and len(shape) > 3:
        return float(shape[3]), shape[1] / max(shape[2], 1)
    steps = new_tokens(op)
    if op.kind == "delta_rule" and len(shape) > 5:
        return steps, float(shape[4] * shape[5])
    return steps, max(op.flops / steps, 1.0)


_TIME_AXIS = {"scan": 1, "delta_rule": 1, "selective_scan": 1, "conv": 1}


def new_tokens(op: Op) -> float:
    """New tokens per sequence of an op that runs along time, read off its shape; of attention the queries that meet one
    key head, since a step with grouped heads is a small product and one without is none. 1 for all others."""
    shape = op.shape
    if op.kind == "attention" and len(shape) > 3:
        return float(shape[3] * max(1, shape[1] // max(shape[2], 1)))
    axis = _TIME_AXIS.get(op.kind)
    return float(shape[axis]) if axis is not None and len(shape) > axis else 1.0


def _kind(compute: Curve | float, memory: Curve | float, launch_us: float) -> KindEfficiency:
    return KindEfficiency(
        compute=compute if isinstance(compute, Curve) else Curve.constant(compute),
        memory=memory if isinstance(memory, Curve) else Curve.constant(memory),
        launch_seconds=launch_us / 1e6,
    )


# Matrix products reach 0.78 to 0.87 of the bf16 peak at their best shape (stas00/ml-engineering, MAMF tables) and far less
# with few rows: utilisation over rows as NVIDIA's AIConfigurator stores it for H100.
_GEMM_ROWS = {16.0: 0.12, 64.0: 0.35, 256.0: 0.55, 1024.0: 0.70, 4096.0: 0.76}
_GROUPED_ROWS = {1.0: 0.05, 16.0: 0.15, 64.0: 0.30, 256.0: 0.45, 1024.0: 0.55}

# FlashAttention 2 and 3 reach 0.5 to 0.75 on long prompts, and half of it on short ones (their papers' figures).
_ATTENTION_TOKENS = {16.0: 0.05, 128.0: 0.2, 512.0: 0.4, 2048.0: 0.55}

# Reads of weights and caches reach 0.93 of HBM bandwidth, copies 0.82 (H200, TileOPs issue 1993); small ones less.
_READ = {1e5: 0.25, 1e6: 0.6, 1e7: 0.85, 1e8: 0.93}
_COPY = {1e5: 0.2, 1e6: 0.5, 1e7: 0.75, 1e8: 0.82}

ACCELERATOR = Efficiency(
    name="data sheet with efficiencies from the literature",
    source="roofline",
    kinds={
        "gemm": _kind(Curve.over(_GEMM_ROWS), Curve.over(_READ), 6),
        "grouped_gemm": _kind(Curve.over(_GROUPED_ROWS), Curve.over(_READ), 20),
        "attention": _kind(Curve.over(_ATTENTION_TOKENS), Curve.over(_READ), 10),
        "scan": _kind(0.25, Curve.over(_COPY), 30),  # vLLM's Mamba-2 prefill runs at 0.27 of peak
        "delta_rule": _kind(0.2, Curve.over(_COPY), 40),
        "selective_scan": _kind(0.1, 0.3, 20),
        "conv": _kind(0.05, Curve.over(_COPY), 8),
        "pointwise": _kind(0.5, Curve.over(_COPY), 6),
        "gather": _kind(0.5, 0.5, 8),
        "collective": _kind(0.5, 0.75, 12),
    },
    layer_seconds=20e-6,  # with the launches above, a layer of decode costs the 60 to 100 us seen on GeForce and H100
    step_seconds=126e-6,  # fitted by BLIS (inference-sim) on vLLM
    overlaps=True,
    spread={"prefill": (0.65, 2.0), "decode": (0.8, 1.6)},
)

PROCESSOR = Efficiency(
    name="instruction set with ordinary efficiencies of processors",
    source="roofline",
    kinds={
        "gemm": _kind(Curve.over({1.0: 0.1, 16.0: 0.3, 256.0: 0.5}), 0.7, 6),
        "grouped_gemm": _kind(Curve.over({1.0: 0.08, 16.0: 0.2, 256.0: 0.4}), 0.6, 40),
        "attention": _kind(0.2, 0.5, 20),
        "scan": _kind(0.1, 0.3, 150),
        "delta_rule": _kind(0.08, 0.3, 200),
        "selective_scan": _kind(0.05, 0.1, 100),
        "conv": _kind(0.05, 0.3, 20),
        "pointwise": _kind(0.2, 0.3, 10),
        "gather": _kind(0.5, 0.4, 10),
        "collective": _kind(0.5, 0.5, 10),
    },
    layer_seconds=20e-6,
    step_seconds=100e-6,
    overlaps=False,
    spread={"prefill": (0.4, 2.5), "decode": (0.5, 2.5)},
)


def adapted(base: Efficiency, fit: Mapping[str, Any], name: str) -> Efficiency:
    """`base` under an engine fitted to public figures: factors on its curves, and constants instead of launches.

    Args:
        fit: "read" (factor on bandwidth), "products" and "experts" (factors on arithmetic), "layer_seconds",
            "step_seconds", "spread" by phase, "computes" (see `Efficiency`), and "made": which rows it was fitted to.
    """
    kinds = {
        kind: KindEfficiency(
            compute=_times(curves.compute, fit["experts"] if kind == "grouped_gemm" else fit["products"]),
            memory=_times(curves.memory, fit["read"]),
            launch_seconds=0.0,
        )
        for kind, curves in base.kinds.items()
    }
    return Efficiency(
        name=name,
        source="calibrated",
        kinds=kinds,
        layer_seconds=fit["layer_seconds"],
        step_seconds=fit["step_seconds"],
        overlaps=base.overlaps,
        computes=fit.get("computes", ""),
        spread={phase: (float(low), float(high)) for phase, (low, high) in fit["spread"].items()},
        made=fit["made"],
    )


def _times(curve: Curve, factor: float) -> Curve:
    return Curve(curve.x, curve.y, tuple(tuple(value * factor for value in row) for row in curve.values))


def to_json(table: Efficiency) -> dict[str, Any]:
    """The table as plain data, readable by `from_json`."""
    return {
        "archcompass_efficiency": FORMAT,
        "name": table.name,
        "source": table.source,
        "made": dict(table.made),
        "peaks": dict(table.peaks),
        "launches": dict(table.launches),
        "training": dict(table.training),
        "layer_seconds": table.layer_seconds,
        "step_seconds": table.step_seconds,
        "overlaps": table.overlaps,
        "spread": {phase: list(factors) for phase, factors in table.spread.items()},
        "kinds": {
            name: {
                "compute": _curve_to_json(kind.compute),
                "memory": _curve_to_json(kind.memory),
                "launch_seconds": float(f"{kind.launch_seconds:.4g}"),
            }
            for name, kind in table.kinds.items()
        },
    }


def from_json(data: Any, where: str = "efficiency table") -> Efficiency:
    """The table that `to_json` wrote.

    Raises:
        FileFormatError: it is no such table, or a broken one.
    """
    try:
        if data["archcompass_efficiency"] != FORMAT:
            raise FileFormatError(
                f"{where}: format {data['archcompass_efficiency']!r} is not {FORMAT}; calibrate again"
            )
        kinds = {
            name: KindEfficiency(
                compute=_curve_from_json(kind["compute"]),
                memory=_curve_from_json(kind["memory"]),
                launch_seconds=float(kind["launch_seconds"]),
            )
            for name, kind in data["kinds"].items()
        }
        return Efficiency(
            name=str(data["name"]),
            source=str(data["source"]),
            kinds=kinds,
            layer_seconds=float(data["layer_seconds"]),
            step_seconds=float(data["step_seconds"]),
            overlaps=bool(data["overlaps"]),
            peaks={name: float(value) for name, value in data["peaks"].items()},
            spread={phase: (float(low), float(high)) for phase, (low, high) in data["spread"].items()},
            launches={name: float(value) for name, value in data.get("launches", {}).items()},
            training={name: float(value) for name, value in data.get("training", {}).items()},
            made=dict(data["made"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{where} is no efficiency table of ours ({error}); calibrate again") from error


def _curve_to_json(curve: Curve) -> dict[str, Any]:
    rounded = [[float(f"{value:.4g}") for value in row] for row in curve.values]
    return {"x": [float(f"{x:.6g}") for x in curve.x], "y": list(curve.y), "values": rounded}


def _curve_from_json(data: Mapping[str, Any]) -> Curve:
    curve = Curve(
        tuple(float(x) for x in data["x"]),
        tuple(float(y) for y in data["y"]),
        tuple(tuple(float(value) for value in row) for row in data["values"]),
    )
    sound = len(curve.values) == len(curve.x) > 0 and all(len(row) == len(curve.y) > 0 for row in curve.values)
    ascending = all(list(axis) == sorted(set(axis)) and axis[0] > 0 for axis in (curve.x, curve.y))
    if not sound or not ascending or not all(0 < value < 1e6 for row in curve.values for value in row):
        raise ValueError("a curve with axes that do not match, or values out of range")
    return curve


@lru_cache(maxsize=64)
def shipped(name: str) -> Efficiency | None:
    """A table that came with the package, by its file's name; None when there is none."""
    source = Path(__file__).parent / f"data/efficiency/{name}.json"
    if not source.is_file():
        return None
    return from_json(json.loads(source.read_text(encoding="utf-8")), where=f"data/efficiency/{name}.json")


def scaled(points: Mapping[float, float]) -> dict[float, float]:
    """Points of a curve with the efficiency capped where a time would fall as the size grows: time ∝ size / efficiency."""
    kept: dict[float, float] = {}
    before: tuple[float, float] | None = None
    for size in sorted(points):
        value = points[size]
        if before is not None:
            value = min(value, before[1] * size / before[0])
        kept[size] = value
        before = (size, value)
    return kept


def middle(tables: Sequence[Efficiency]) -> Efficiency:
    """Several tables of one machine, measured with the same peaks at different times, as one: each point at its median."""
    first = tables[0]
    kinds = {name: _middle([table.kinds[name] for table in tables if name in table.kinds]) for name in first.kinds}
    training = {
        name: median(table.training[name] for table in tables if name in table.training) for name in first.training
    }
    return replace(first, kinds=kinds, training=training, step_seconds=median(table.step_seconds for table in tables))


def _middle(kinds: Sequence[KindEfficiency]) -> KindEfficiency:
    return KindEfficiency(
        compute=_middle_curve([kind.compute for kind in kinds]),
        memory=_middle_curve([kind.memory for kind in kinds]),
        launch_seconds=median(kind.launch_seconds for kind in kinds),
    )


def _middle_curve(curves: Sequence[Curve]) -> Curve:
    xs = sorted({x for curve in curves for x in curve.x})
    ys = sorted({y for curve in curves for y in curve.y})
    return Curve(tuple(xs), tuple(ys), tuple(tuple(median(c.at(x, y) for c in curves) for y in ys) for x in xs))


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log v)), the middle of ratios."""
    return exp(sum(log(value) for value in values) / len(values))
