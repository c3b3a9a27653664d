"""Cases in a process of their own, which is started anew where one of them brings it down or runs out of time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

import torch

from gpu_suite.case import Case
from gpu_suite.cases import cases
from gpu_suite.clock import Clock, data_sheet, device_facts, probe
from gpu_suite.measure import described, measured
from gpu_suite.row import Row

MARK = "@row "


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
