"""Compiles every Triton kernel for every GPU generation, and keeps what each needs: `make kernels-aot`.

Writes benchmarks/results/kernels_aot_triton_X.Y.json (registers, spills, shared memory, tensor core instructions), one table
for each version of Triton it was run with, to be read as a diff in review; exits with 1 when a kernel does not compile or is
over its budget. Needs no GPU. Takes minutes; the test suite does the short version.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests" / "triton"))

from support.budget import compiled, faults  # noqa: E402
from support.cases import compilations  # noqa: E402

from archcompass.kernels.aot import TARGETS  # noqa: E402


def sweep(capability: int) -> tuple[list[dict[str, object]], list[str]]:
    """Every case on one compute capability: the rows of the table, and the faults."""
    rows, wrong = [], []
    for name, case in compilations().items():
        if case.only and capability not in case.only:
            continue
        try:
            kernels = compiled(case, capability)
        except RuntimeError as error:  # the compiler gave up
            wrong.append(f"{name}: sm_{capability}: {error}")
            continue
        wrong += [f"{name}: {fault}" for fault in faults(case, kernels)]
        for kernel in kernels:
            rows.append(
                {
                    "case": name,
                    "kernel": kernel.kernel,
                    "capability": capability,
                    "options": kernel.options,
                    "registers": kernel.registers,
                    "spill_bytes": kernel.spill_bytes,
                    "shared_bytes": kernel.shared_bytes,
                    "tensor_core_instructions": kernel.tensor_core_instructions,
                }
            )
    return rows, wrong


def main() -> int:
    """Sweeps two capabilities at a time."""
    import torch
    import triton

    with ProcessPoolExecutor(max_workers=2) as pool:
        swept = list(pool.map(sweep, TARGETS))
    rows = sorted(
        (row for part, _ in swept for row in part), key=lambda row: (row["case"], row["kernel"], row["capability"])
    )
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    results = RESULTS / f"kernels_aot_triton_{triton.__version__.rpartition('.')[0]}.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    results.write_text(f'{{"versions": {json.dumps(versions)}, "kernels": [\n{lines}\n]}}\n')
    wrong = [fault for _, faults_found in swept for fault in faults_found]
    print("\n".join([*wrong, f"{len(rows)} compiled variants, {len(wrong)} over budget; {results.relative_to(ROOT)}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
