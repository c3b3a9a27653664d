"""`calibrate`: measures this machine and writes the efficiency table that later predictions use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson
from archcompass.advisor.cli.output import console, keeping, print_json, progress


@app.command()
def calibrate(
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option("--seconds", help="About how long it may take.", min=5, max=3600)] = 150.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print; keep nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine and write its efficiency table for later predictions.

    Matrix products by shape, attention, every block's own operation, memory, launches; under three minutes.

    Example: archcompass calibrate --device cpu
    """
    from archcompass.profiles.calibrate import calibrate as run
    from archcompass.profiles.efficiency import to_json

    with keeping("the table from before stays: it is written at the end"), progress(f"calibrating {device}") as update:
        table, path = run(device, progress=update, budget_seconds=seconds, keep=not dry_run)
    if as_json:
        print_json(to_json(table) | {"kept": None if path is None else str(path)})
        return
    out = console()
    out.print(f" [bold]{table.name}[/]", highlight=False)
    for name, value in table.peaks.items():
        told = f"{value / 1e9:,.1f} GB/s" if name == "bandwidth" else f"{value / 1e12:,.2f} TFLOP/s"
        out.print(f" {name:<12} {told:>16}", highlight=False)
    for name, value in table.launches.items():
        out.print(f" {f'launch, {name}':<16} {value * 1e6:>12,.1f} µs", highlight=False)
    out.print(f" {len(table.kinds)} curves, {table.step_seconds * 1e6:,.0f} µs a step", highlight=False)
    for doubt in doubts(table.made):
        out.print(f" [bold]Doubtful[/] {doubt}", highlight=False)
    out.print(f" Kept: {path}" if path else " Nothing kept (--dry-run).", markup=False)


def doubts(made: Mapping[str, Any]) -> list[str]:
    """What a table's own account (`Efficiency.made`) says against it."""
    found = []
    if made["left_out"]:
        found.append(f"{len(made['left_out'])} measurements were left out for want of time: give more --seconds")
    if made["load"] is not None and made["load"] > made["threads"] + 1:
        found.append(f"other programs ran (load {made['load']:g}): calibrate again on an idle machine")
    return found
