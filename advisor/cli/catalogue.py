"""`models` and `gpus`: what is known, with sources."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson, AsMarkdown
from archcompass.advisor.cli.output import print_json

Name = Annotated[str | None, typer.Argument(help="One of them, in full.", show_default=False)]


@app.command()
def models(name: Name = None, as_json: AsJson = False, markdown: AsMarkdown = False) -> None:
    """Published models: parameters, cache per token, constant state, source.

    Example: archcompass models jamba-v0.1
    """
    from archcompass.advisor.catalogue import model_facts, model_names
    from archcompass.advisor.report.tables import show_table

    rows = [model_facts(name)] if name else [model_facts(known) for known in model_names()]
    if as_json:
        return print_json(rows)
    if name:
        return _sheet(rows[0])
    columns = {
        "name": "name",
        "family": "family",
        "total": "parameters.total",
        "active": "parameters.active",
        "cache/token": "state_bytes_per_token",
        "constant state": "state_bytes_constant",
        "source": "source",
    }
    show_table(rows, columns, markdown=markdown)
    return None


@app.command()
def gpus(name: Name = None, as_json: AsJson = False, markdown: AsMarkdown = False) -> None:
    """Accelerators: memory, bandwidth, dense arithmetic, source.

    Example: archcompass gpus "2x RTX 4090"
    """
    from archcompass.advisor.catalogue import gpu_facts, gpu_names
    from archcompass.advisor.report.tables import show_table

    rows = [gpu_facts(name)] if name else [gpu_facts(known) for known in gpu_names()]
    if as_json:
        return print_json(rows)
    if name:
        return _sheet(rows[0])
    columns = {
        "id": "id",
        "memory": "memory_bytes",
        "bandwidth": "bandwidth_bytes_per_second",
        "bf16/fp16": "flops.16bit",
        "fp8": "flops.fp8",
        "source": "source",
    }
    show_table(rows, columns, markdown=markdown)
    return None


def _sheet(facts: dict[str, Any]) -> None:
    """One entry, a fact a line."""
    from archcompass.advisor.report.layout import Cell, Column, row, width, write
    from archcompass.advisor.report.tables import flatten, shown

    flat = {key: shown(key, value) for key, value in flatten(facts).items() if value not in (None, "")}
    wide = max(map(len, flat)) + 1
    columns = [Column(wide, gap=2), Column(width() - wide - 2)]
    for key, value in flat.items():
        write(row([Cell(f" {key}", dim=True), Cell(value)], columns))
