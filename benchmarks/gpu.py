"""Every kernel on this GPU: right first, then how fast, how near to what the device can do, and beside who else offers it.

    python -P benchmarks/gpu.py [--quick] [--only OPERATION] [--out FILE]

Needs torch and triton. Peers (flash-linear-attention, Liger, mamba-ssm, causal-conv1d) are measured where they can be
imported, and said to be missing where not. Prints a row per case and ends with one JSON document: device, versions,
probes, rows. A row that failed keeps its error in the place of a time.

- Right: results, final states and gradients against the formula in float64 at a small shape. The error may be twice that
  of plain torch in the same type, plus a few roundings. What is wrong is not timed; nor is a peer that disagrees.
- First call: seconds of the first call at the real shape, forward pass included, with an empty compilation cache; what an
  earlier case of the same process compiled is not compiled again.
- Time: CUDA events around single calls, the second-level cache overwritten before each, ours and the peers taking turns;
  medians. Calls without gradients are also recorded as CUDA graphs, whose times leave out what Python takes to launch;
  the headline is the graph's where there is one, and a peer is compared by the same clock.
- Roofline: the least time that the case's work takes at the speed of a large matrix product and of a large copy,
  measured in the same process, divided by the time; and the same with the speeds of the data sheet.

The cases run in a process of their own, which is started anew where one of them brings it down or runs out of time.
Without a GPU this says so and ends with 1. With TRITON_INTERPRET=1 it checks every kind of case at a tiny shape on the
CPU, and times nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
if find_spec("archcompass") is None:
    sys.path.insert(0, str(HERE.parent / "src"))
sys.path.append(str(HERE))

from gpu_cases import Case, Inputs, Maker, Work, cases  # noqa: E402

MINUTES, QUICK_MINUTES = 8.5, 1.6  # no case begins after that
CASE_SECONDS, QUICK_CASE_SECONDS = 60.0, 25.0
PACKAGES = ("torch", "triton", "flash-linear-attention", "liger-kernel", "mamba-ssm", "causal-conv1d")
CARDS = HERE.parent / "profiles" / "data" / "gpus.json"

SLACK = 2.0  # times the error of plain torch in the same type
FLOOR = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
PEER_ERROR = 0.02  # a peer further off computes something else

ROUNDS = (7, 60)
NOT_MEASURED = "not measured"
MARK = "@row "

Row = dict[str, Any]
Run = Callable[[], Any]


class Wrong(Exception):
    """A result that is too far from the formula to be worth timing."""


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, outputs before states."""
    return [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]


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


def rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON cannot say."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, Wrong) else f"{type(error).__name__}: {text[:300]}"


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


class Clock:
    """Times calls on one GPU."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.flushed = torch.empty(max(4 * cache_bytes, 2**28), dtype=torch.int8, device=device)
        self.shuffle = random.Random(0).shuffle

    def once(self, run: Run) -> float:
        """Milliseconds of one call by events, the cache overwritten before it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def interleaved(self, runs: dict[str, Run], seconds: float) -> dict[str, Row]:
        """Median and quartiles in milliseconds of each; they take turns, in changing order."""
        for run in runs.values():
            run()
            run()
        guess = sum(self.once(run) for run in runs.values()) + 0.2 * len(runs)
        rounds = int(min(max(seconds * 1e3 / guess, ROUNDS[0]), ROUNDS[1]))
        times: dict[str, list[float]] = {name: [] for name in runs}
        order = list(runs.items())
        for _ in range(rounds):
            self.shuffle(order)
            for name, run in order:
                times[name].append(self.once(run))
        return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> Row:
    low, _, high = quantiles(values, n=4)
    return {"ms": rounded(median(values)), "low_ms": rounded(low), "high_ms": rounded(high), "runs": len(values)}


def recorded(run: Run) -> Run:
    """The call as a CUDA graph, without what launching takes.

    Raises:
        RuntimeError: it waits for the device, or does something else that a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    return graph.replay


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
    """FLOPs and bytes of what is timed; the docstring of `gpu_cases` says how those of a backward pass are counted."""
    forward = case.work(case.real)
    if not case.gradients or case.together:
        return forward
    read = sum(x.nbytes for x in inputs.values()) + result.nbytes
    return Work(forward.flops * case.backward_products, read + sum(inputs[name].nbytes for name in case.gradients))


def limits(work: Work, ms: float, tflops: float | None, bandwidth_gb_s: float | None) -> Row:
    """The share of a device's roofline, and which roof it is."""
    if not tflops or not bandwidth_gb_s:
        return {"share": None, "bound": None}
    by_products, by_memory = work.flops / tflops / 1e9, work.bytes / bandwidth_gb_s / 1e6
    bound = "products" if by_products > by_memory else "memory"
    return {"share": rounded(max(by_products, by_memory) / ms), "bound": bound}


def probe(clock: Clock) -> Row:
    """What this device reaches now: a large bfloat16 product, and a large copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(2**30, device=clock.device, dtype=torch.int8)
    target = torch.empty_like(source)
    found = clock.interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, seconds=0.6)
    return {
        "matmul_tflops": rounded(2 * 8192**3 / found["product"]["ms"] / 1e9),
        "copy_gb_s": rounded(2 * source.nbytes / found["copy"]["ms"] / 1e6),
    }


def data_sheet(name: str) -> Row:
    """Dense bfloat16 speed and bandwidth of a card by the name its driver gives, from the table that `profiles` keeps."""
    words = set(name.lower().replace("-", " ").replace("sxm4", "sxm").replace("hbm3", "sxm").split())
    words |= {word.removesuffix("gb") for word in words}
    cards = json.loads(CARDS.read_text(encoding="utf-8"))["gpus"] if CARDS.exists() else []
    fitting = [card for card in cards if set(card["id"].split("-")) <= words and "bf16" in card["tflops"]]
    if not fitting or "laptop" in words:
        return {"card": None, "matmul_tflops": None, "copy_gb_s": None}
    card = max(fitting, key=lambda card: len(card["id"]))
    return {"card": card["id"], "matmul_tflops": card["tflops"]["bf16"], "copy_gb_s": card["bandwidth_gb_s"]}


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


def work_through(names: list[str], seconds: float) -> None:
    """The process that has the GPU: measures the named cases, and says each row on a line of its own."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    clock, known = Clock(device), {case.name: case for case in cases()}
    roofs, sheet = probe(clock), data_sheet(torch.cuda.get_device_name(device))
    tell({"probe": roofs, "data_sheet": sheet, "device": device_facts(device)})
    for name in names:
        tell({"begin": name})
        for row in measured(known[name], clock, roofs, sheet, seconds):
            tell({"row": row})
        torch.cuda.empty_cache()
        torch.cuda.synchronize()  # a device that a kernel has broken raises here, and the parent starts another process
        tell({"end": name})


def tell(message: Row) -> None:
    print(MARK + json.dumps(message), flush=True)


def device_facts(device: torch.device) -> Row:
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name, "compute_capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count, "l2_bytes": found.L2_cache_size, "cuda": torch.version.cuda,
    }  # fmt: skip


class Supervisor:
    """Runs cases in child processes, keeps what they say, and goes on where one falls."""

    def __init__(self, wanted: list[Case], minutes: float, case_seconds: float, command: list[str]) -> None:
        self.command = command
        self.left = [case.name for case in wanted]
        self.rows = {case.name: described(case, dict(case.real), case.dtype) for case in wanted}
        self.facts: Row = {}
        self.deadline, self.case_seconds = time.monotonic() + 60 * minutes, case_seconds

    def run(self) -> list[Row]:
        """All rows, in the order of the cases."""
        while self.left and time.monotonic() < self.deadline:
            self.one_process()
        for name in self.left:
            self.rows[name]["error"] = "not run: the time was up"
        return list(self.rows.values())

    def one_process(self) -> None:
        """Lets one process work until it ends, falls or takes too long."""
        # Peers tune themselves at the first call; what they find may be kept from one run of this to the next.
        environment = {**os.environ, "TRITON_CACHE_AUTOTUNING": "1"}
        command = [*self.command, json.dumps(self.left)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        lines: queue.Queue[str | None] = queue.Queue()
        listener = threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True)
        listener.start()
        current: str | None = None
        until = time.monotonic() + 2 * self.case_seconds  # to start, and to be probed
        try:
            while True:
                try:
                    line = lines.get(timeout=max(0.1, min(until, self.deadline + 10) - time.monotonic()))
                except queue.Empty:
                    self.fallen(current, "stopped: it took too long")
                    break
                if line is None:
                    self.fallen(current, f"its process ended with {child.wait()}")
                    break
                message = json.loads(line[len(MARK) :])
                current = message.get("begin", None if "end" in message else current)
                until = time.monotonic() + self.case_seconds
                self.keep(message)
                if "end" in message and time.monotonic() > self.deadline:
                    break
        finally:
            child.kill()
            child.wait()
            listener.join(timeout=5.0)  # a compiler that outlives its parent may hold the pipe

    def keep(self, message: Row) -> None:
        if "row" in message:
            row = message["row"]
            self.rows[row["case"]] = row
        elif "end" in message:
            self.left.remove(message["end"])
            print(line_of(self.rows[message["end"]]), flush=True)
        elif "probe" in message:
            self.facts.setdefault("probes", []).append(message["probe"])
            self.facts |= {"device": message["device"], "data_sheet": message["data_sheet"]}
            print(f"{message['device']['name']}: {message['probe']}, data sheet {message['data_sheet']}", flush=True)

    def fallen(self, current: str | None, reason: str) -> None:
        """Keeps the reason with the case at fault; a process that did not get as far as a case will not do so again."""
        for name in [current] if current else list(self.left):
            self.give_up(name, reason)

    def give_up(self, name: str, reason: str) -> None:
        row = self.rows[name]
        row["error" if row["ms"] is None else "peers_note"] = row["error"] or reason
        self.left.remove(name)
        print(line_of(row), flush=True)


def _pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    """Messages into the queue, everything else a library prints to standard error; None at the end."""
    with stream:
        for line in stream:
            if line.startswith(MARK):
                lines.put(line)
            else:
                sys.stderr.write(line)
    lines.put(None)


def heading() -> str:
    return (
        f"{'case':76s} {'ms':>9s} {'called':>9s} {'TFLOP/s':>8s} {'GB/s':>7s} {'roof':>5s} {'sheet':>5s} {'first s':>7s}"
        "  peers: ms, times ours"
    )


def line_of(row: Row) -> str:
    """One line of the table."""
    name = f"{row['case']:76s}"
    if row["ms"] is None:
        return f"{name} {row['error'] or row['clock']}"

    def percent(key: str) -> str:
        share = row[key]["share"]
        return "-" if share is None else f"{share:.0%}"

    peers = "; ".join(
        f"{peer} {found['ms']:.4g}, {found['peer_to_ours']:.2f}"
        if found["ms"]
        else f"{peer}: {found.get('note', '-')[:60]}"
        for peer, found in row["peers"].items()
    )
    shares = f"{percent('of_measured_roofline'):>5s} {percent('of_data_sheet'):>5s}"
    speeds = f"{row['tflops'] or 0:8.1f} {row['gb_s']:7.0f} {shares}"
    trouble = row["error"] or row.get("peers_note")
    tail = f"  ! {trouble}" if trouble else ""
    return f"{name} {row['ms']:9.4f} {row['as_called_ms']:9.4f} {speeds} {row['first_call_s']:7.2f}  {peers}{tail}"


def versions() -> Row:
    found: Row = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def one_of_each(wanted: list[Case]) -> list[Case]:
    """Cases that differ only in their real shape are one case at a tiny one."""
    return list({(case.operation, case.kind): case for case in reversed(wanted)}.values())[::-1]


def document(mode: str, rows: list[Row], facts: Row) -> Row:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "mode": mode, "versions": versions(),
        "device": None, **facts, "failed": [row["case"] for row in rows if row["error"]], "rows": rows,
    }  # fmt: skip


def hand_over(result: Row, out: Path | None) -> None:
    """Prints the document, or writes it to a file at once: never half of it."""
    if out is None:
        print(json.dumps(result))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(out)
    print(f"written: {out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cases that have a target, under two minutes")
    parser.add_argument("--only", metavar="OPERATION", help="cases whose name begins with this")
    parser.add_argument("--out", type=Path, help="where to write the JSON document; else it is the last line printed")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.worker:
        seconds, names = options.worker
        work_through(json.loads(names), float(seconds))
        return 0
    wanted = [
        case for case in cases() if case.name.startswith(options.only or "") and (case.quick or not options.quick)
    ]
    if not wanted:
        known = sorted({case.operation for case in cases()})
        print(f"no case begins with {options.only!r}; operations: {', '.join(known)}", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        torch.set_num_threads(1)
        rows = [interpreted(case) for case in one_of_each(wanted)]
        for row in rows:
            print(f"{row['case']:48s} {row['error'] or 'right'}; time {NOT_MEASURED}")
        hand_over(document("interpreter", rows, {}), options.out)
        return int(any(row["error"] for row in rows))
    if not torch.cuda.is_available():
        print(
            "no CUDA device here, so nothing is measured; TRITON_INTERPRET=1 checks the cases on the CPU",
            file=sys.stderr,
        )
        return 1
    print(heading())
    minutes, seconds = (QUICK_MINUTES, QUICK_CASE_SECONDS) if options.quick else (MINUTES, CASE_SECONDS)
    command = [sys.executable, "-P", __file__, "--worker", "0.15" if options.quick else "0.3"]
    supervisor = Supervisor(wanted, minutes, seconds, command)
    rows = supervisor.run()
    hand_over(document("quick" if options.quick else "full", rows, supervisor.facts), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
