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
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
if find_spec("archcompass") is None:
    sys.path.insert(0, str(HERE.parent / "src"))
sys.path.append(str(HERE))

from gpu_suite.case import Case  # noqa: E402
from gpu_suite.cases import cases  # noqa: E402
from gpu_suite.measure import interpreted  # noqa: E402
from gpu_suite.row import NOT_MEASURED, Row  # noqa: E402
from gpu_suite.supervisor import Supervisor, heading, work_through  # noqa: E402

MINUTES, QUICK_MINUTES = 8.5, 1.6  # no case begins after that
CASE_SECONDS, QUICK_CASE_SECONDS = 60.0, 25.0
PACKAGES = ("torch", "triton", "flash-linear-attention", "liger-kernel", "mamba-ssm", "causal-conv1d")


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
