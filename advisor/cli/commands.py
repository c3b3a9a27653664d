"""The list of commands, in the order `--help` shows them."""

from importlib import import_module

FILES = ("ask", "recommend", "advise", "profile", "compare", "catalogue", "convert", "doctor")


def register() -> None:
    """Imports every command's file; each adds itself to the application."""
    for name in FILES:
        import_module(f"archcompass.advisor.cli.{name}")
