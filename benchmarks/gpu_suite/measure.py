"""One case: right first, then timed, then beside its peers."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_suite.case import Case, Inputs, Maker, Work
from gpu_suite.clock import Clock, limits, recorded
from gpu_suite.row import NOT_MEASURED, Row, Run, Wrong, rounded, said, tensors

SLACK = 2.0  # times the error of plain torch in the same type

FLOOR = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}

PEER_ERROR = 0.02  # a peer further off computes something else


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected; infinite where anything is not finite."""
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def outcome(case: Case, run: Callable[..., Any], inputs: Inputs, states: bool = True) -> list[Tensor]:
    """Results of a call on copies of the inputs (steps overwrite their state), and gradients of a weighted sum of them.

    Without `states` only the first result counts: peers differ in what else they return.
    """
    copies = {name: x.detach().clone() for name, x in inputs.items()}
    leaves = [copies[name].requires_grad_() for name in case.gradients]
    with torch.set_grad_enabled(bool(leaves)):
        results = tensors(run(**copies))[: None if states else 1]
    if not leaves:
        return results
    return [x.detach() for x in results] + list(torch.autograd.grad(results, leaves, weights_of(results)))


def weights_of(results: list[Tensor]) -> list[Tensor]:
    """The same random gradients for results of the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]


def check(case: Case, inputs: Inputs) -> tuple[Row, list[Tensor]]:
    """Errors of ours and of plain torch against the formula in float64, and what the formula says.

    Raises:
        Wrong: one of our results is further off than it may be.
    """
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = outcome(case, partial(case.call, "reference"), exact)
    ours, plain = (outcome(case, partial(case.call, backend), inputs) for backend in ("triton", "torch"))
    kind = inputs[next(iter(inputs))].dtype
    found: Row = {"error": [], "error_of_torch": []}
    for n, (got, same, want) in enumerate(zip(ours, plain, expected, strict=True)):
        mine, theirs = relative_error(got, want), relative_error(same, want)
        found["error"].append(rounded(mine))
        found["error_of_torch"].append(rounded(theirs))
        if not mine <= SLACK * theirs + FLOOR[kind]:
            raise Wrong(f"wrong, so not timed: result {n} is off by {mine:.2e}, plain torch by {theirs:.2e}")
    return found, expected


@contextmanager
def empty_cache() -> Iterator[None]:
    """Triton compiles anew inside: a first call is a first call, whatever ran on this machine before."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def ready(case: Case, run: Callable[..., Any], inputs: Inputs) -> Run:
    """What is timed: the call, its backward pass alone, or both together. Only the first result gets a gradient."""
    if not case.gradients:

        def forward() -> Any:
            with torch.no_grad():
                return run(**inputs)

        return forward
    given = {name: x.detach().requires_grad_(name in case.gradients) for name, x in inputs.items()}
    leaves = [given[name] for name in case.gradients]
    if case.together:
        return lambda: torch.autograd.grad(tensors(run(**given))[0], leaves)
    result = tensors(run(**given))[0]
    gradient = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, leaves, gradient, retain_graph=True)


def work_of(case: Case, inputs: Inputs, result: Tensor) -> Work:
    """FLOPs and bytes of what is timed; the docstring of `case` says how those of a backward pass are counted."""
    forward = case.work(case.real)
    if not case.gradients or case.together:
        return forward
    read = sum(x.nbytes for x in inputs.values()) + result.nbytes
    return Work(forward.flops * case.backward_products, read + sum(inputs[name].nbytes for name in case.gradients))


def described(case: Case, shape: dict[str, int], dtype: torch.dtype) -> Row:
    return {
        "operation": case.operation, "case": case.name, "shape": shape, "dtype": str(dtype)[6:], "ms": None,
        "clock": NOT_MEASURED, "peers": {}, "error": None,
    }  # fmt: skip


def interpreted(case: Case) -> Row:
    """One case at a tiny shape on the CPU, in Triton's interpreter: right or not, and no time."""
    row = described(case, dict(case.real) | dict(case.tiny), case.interpreted)
    row["case"] = f"{case.operation} {case.kind}"
    try:
        torch.manual_seed(0)
        row["agreement"], _ = check(case, case.inputs(Maker(torch.device("cpu"), case.interpreted), row["shape"]))
    except Exception as error:
        row["error"] = said(error)
    return row


def measured(case: Case, clock: Clock, roofs: Row, sheet: Row, seconds: float) -> Iterator[Row]:
    """One case on the GPU: our row as soon as there is one, and again with the peers in it."""
    row = described(case, dict(case.real), case.dtype)
    try:
        torch.manual_seed(0)
        make = Maker(clock.device, case.dtype)
        inputs = case.inputs(make, case.real)
        started = time.perf_counter()
        with empty_cache():
            ours = ready(case, partial(case.call, "triton"), inputs)
            ours()
            torch.cuda.synchronize()
        row["first_call_s"] = rounded(time.perf_counter() - started)
        small = case.inputs(make, dict(case.real) | dict(case.check))
        row["agreement"], expected = check(case, small)
        with torch.no_grad():
            result = tensors(case.call("triton", **inputs))[0]
        work = work_of(case, inputs, result)
        del result
        fill(row, timed({"ours": ours}, case, clock, seconds), work, roofs, sheet)
        yield row
        runs = {"ours": ours} | agreeing(case, small, inputs, expected, row)
        if len(runs) > 1:
            fill(row, timed(runs, case, clock, seconds), work, roofs, sheet)
    except Exception as error:
        row["error"] = said(error)
    yield row


def agreeing(case: Case, small: Inputs, inputs: Inputs, expected: list[Tensor], row: Row) -> dict[str, Run]:
    """The peers that are here and right; the others leave a note in the row."""
    found: dict[str, Run] = {}
    states = not case.gradients
    if case.gradients and case.peers:
        exact = {name: x.double() if x.is_floating_point() else x for name, x in small.items()}
        expected = outcome(case, partial(case.call, "reference"), exact, states)
    for name, peer in case.peers.items():
        started, row["peers"][name] = time.perf_counter(), {"ms": None}
        try:
            errors = [relative_error(*pair) for pair in zip(outcome(case, peer, small, states), expected, strict=False)]
            if not max(errors) <= PEER_ERROR:
                raise Wrong(f"it differs by {max(errors):.2e}, so it is not timed")
            found[name] = ready(case, peer, inputs)
            found[name]()
            torch.cuda.synchronize()
            row["peers"][name] |= {"agreement": [rounded(e) for e in errors]}
        except ImportError as error:
            row["peers"][name]["note"] = f"not here ({said(error)})"
        except Exception as error:
            found.pop(name, None)
            row["peers"][name]["note"] = said(error)
        row["peers"][name]["first_call_s"] = rounded(time.perf_counter() - started)
    return found


def timed(runs: dict[str, Run], case: Case, clock: Clock, seconds: float) -> dict[str, Row]:
    """Times as called, and as graphs where they can be recorded."""
    found = clock.interleaved(runs, seconds)
    if case.gradients:
        return found
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            graphs[name] = recorded(run)
        except Exception as error:
            found[name]["graph_note"] = said(error)
    for name, times in clock.interleaved(graphs, seconds).items() if graphs else ():
        found[name]["graph"] = times
    return found


def fill(row: Row, found: dict[str, Row], work: Work, roofs: Row, sheet: Row) -> None:
    """Writes the times into a row, with what follows from them."""
    ours = found["ours"]
    graph = ours.get("graph")
    best = graph or ours
    ms = best["ms"]
    row |= {
        "clock": "graph" if graph else "events",
        **best,
        "as_called_ms": ours["ms"],
        "graph_note": ours.get("graph_note"),
    }
    row |= {"flops": work.flops, "bytes": work.bytes}
    row |= {"tflops": rounded(work.flops / ms / 1e9), "gb_s": rounded(work.bytes / ms / 1e6)}
    for key, speeds in (("of_measured_roofline", roofs), ("of_data_sheet", sheet)):
        row[key] = limits(work, ms, speeds["matmul_tflops"], speeds["copy_gb_s"])
    for name, times in found.items():
        if name == "ours":
            continue
        same = bool(graph) and "graph" in times
        theirs, mine = (times["graph"]["ms"], ms) if same else (times["ms"], ours["ms"])
        clock = "graph" if same else "events"
        row["peers"][name] |= {**times, "ms": theirs, "clock": clock, "peer_to_ours": rounded(theirs / mine)}
