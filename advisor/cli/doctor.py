"""`doctor`: versions, devices, which kernels run where and why."""

from __future__ import annotations

from archcompass.advisor.cli.app import app
from archcompass.advisor.cli.flags import AsJson
from archcompass.advisor.cli.output import console, print_json


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, and which kernel serves which operation here, and why.

    Paste its output into a bug report.

    Example: archcompass doctor
    """
    from archcompass.advisor.doctor import examine

    found = examine()
    if as_json:
        return print_json(found)
    _show(found)
    return None


def _show(found: dict[str, object]) -> None:
    from rich.table import Table

    out = console()
    versions: dict[str, str | None] = found["versions"]  # type: ignore[assignment]
    out.print(
        " [bold]Versions[/]   " + "  ·  ".join(f"{name} {value or 'not installed'}" for name, value in versions.items())
    )
    out.print()
    for device in found["devices"]:  # type: ignore[attr-defined]
        facts = "  ·  ".join(f"{key} {value}" for key, value in device.items() if key != "device")
        out.print(f" [bold]{device['device']}[/]   {facts}")
    table = Table(box=None, pad_edge=True, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("operation", "device", "served by", "at best", "why", "passed over"):
        table.add_column(column)
    for row in found["operations"]:  # type: ignore[attr-defined]
        passed = "; ".join(f"{name}: {why}" for name, why in row["rejected"].items())
        ms = row["predicted_ms"].get(row["backend"])
        best = "-" if ms is None else f"{ms:,.1f} ms"
        table.add_row(row["operation"], row["device"], f"[bold]{row['backend']}[/]", best, row["reason"], passed or "-")
    out.print()
    out.print(table)
    out.print(" [dim]at best: a usual bfloat16 call at the peaks of the device; --json has sizes and alternatives[/]")
