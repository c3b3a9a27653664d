"""A training run for a person: what was learned, the curve, the speed, and what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from archcompass.advisor.cli.output import console
from archcompass.advisor.units import say_bytes

BARS = "▁▂▃▄▅▆▇█"

COLUMNS = 60


def show(data: dict[str, Any]) -> None:
    """Prints a run's report, as `train --json` gives it."""
    out = console()
    for line in lines(data):
        out.print(line, highlight=False)


def lines(data: dict[str, Any]) -> list[str]:
    """The report, a line each."""
    first, last = data["held_out"][0]["loss"], data["held_out"][-1]["loss"]
    verdict = "learns" if last < first else "did not learn"
    bits = "" if data["bits_per_byte"] is None else f", {data['bits_per_byte']:.2f} bits per byte"
    speed = "-" if data["tokens_per_second"] is None else f"{data['tokens_per_second']:,.0f} tokens/s"
    peak = "" if data["peak_memory_bytes"] is None else f" · {say_bytes(data['peak_memory_bytes'])} at most"
    losses = [point["loss"] for point in data["losses"]]
    told = [
        f" [bold]{escape(data['model'])} {verdict}[/]: held-out loss {first:.3f} → {last:.3f} nats{bits}, "
        f"{data['steps']:,} steps",
        f" [dim]loss[/]    {curve(losses)}  {losses[0]:.3f} → {losses[-1]:.3f}" if losses else " [dim]loss[/]    -",
        f" [dim]size[/]    {data['parameters']:,} parameters, {data['tokens_per_step']:,} tokens a step",
        f" [dim]speed[/]   {speed}{peak} · {data['device']}, {data['precision']}, measured",
        f" [dim]kept[/]    {escape(data['checkpoint'] or 'nothing; -o DIR keeps checkpoints')}",
    ]
    return told + [f" [dim]note[/]    {escape(note)}" for note in data["notes"]]


def curve(values: Sequence[float]) -> str:
    """The values as a line of bars; several share a bar where there are more than fit."""
    per_bar = -(-len(values) // COLUMNS)
    means = [sum(part) / len(part) for part in (values[at : at + per_bar] for at in range(0, len(values), per_bar))]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in means)
