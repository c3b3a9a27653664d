"""`python -m archcompass` and the console script."""

import gc
import os
import sys


def main() -> None:
    """Runs the command line.

    The collector is off until a command starts real work (`output.progress` turns it on), and a process that never loaded
    torch ends without taking itself apart: together a seventh of the time that a short answer takes.
    """
    gc.disable()
    from archcompass.advisor.cli.app import run

    try:
        run()
    except SystemExit as done:
        if "torch" in sys.modules or not isinstance(done.code, int | None):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code or 0)


if __name__ == "__main__":
    main()
