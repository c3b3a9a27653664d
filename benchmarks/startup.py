"""How long the first answer takes, beside the imports it cannot do without; interleaved processes, medians.

    python -P benchmarks/startup.py [--rounds 20]

Compiled files must be allowed (no PYTHONDONTWRITEBYTECODE), else every start compiles the package anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).with_name("archcompass")
COMMANDS = {
    "imports": [sys.executable, "-P", "-c", "import typer, pydantic, rich, yaml"],
    "help": [str(SCRIPT), "--help"],
    "recommend": [str(SCRIPT), "recommend", str(ROOT / "examples" / "chat-bot.yaml")],
}


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Measures, prints and keeps the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    for command in COMMANDS.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["imports"] for name in ("help", "recommend")}
    packages = ("typer", "pydantic", "rich", "pyyaml")
    result = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "rounds": rounds,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "least_seconds": {name: round(min(values), 4) for name, values in times.items()},
        "times_the_imports": {name: round(value, 3) for name, value in ratios.items()},
    }
    (ROOT / "benchmarks" / "results" / "startup.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
