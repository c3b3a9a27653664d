"""The command line. Every command parses, calls one library function, and renders."""


def run() -> None:
    """The console script."""
    from archcompass.advisor.cli.app import run as start

    start()
