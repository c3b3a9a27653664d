"""The `archcompass` command: one typer application, whose commands live in the files beside this one.

Nothing here imports torch, and no command imports what another needs: `--help` must stay quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from archcompass import __version__
from archcompass.advisor.cli.output import fail
from archcompass.errors import ArchcompassError, StoppedError

app = typer.Typer(
    name="archcompass",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=(
        "Which neural architecture fits your workload: picked with reasons, sized for your GPU, built from real blocks, "
        "profiled."
    ),
    epilog="Exit codes: 0 done and fits · 1 does not fit, or a check failed · 2 bad input · 130 stopped by Ctrl-C.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"archcompass {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """See `archcompass COMMAND --help`."""


def run() -> None:
    """Runs the command line: what goes wrong is one line and an exit code, never a traceback."""
    # Plugins of pydantic trace other people's programs; looking for them costs each start a tenth of its time.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from archcompass.advisor.cli.commands import register

    register(sys.argv[1:])
    try:
        code = app(prog_name="archcompass", standalone_mode=False)
        sys.stdout.flush()
        if code == StoppedError.exit_code:  # what typer makes of Ctrl-C where no command has more to say
            raise KeyboardInterrupt
    except ArchcompassError as error:
        fail(str(error))
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        fail("stopped; nothing was left half-written")
        code = StoppedError.exit_code
    except OSError as error:
        # A file that cannot be used is refused by name where it is opened; without a name it is our output.
        if error.filename is not None:
            raise
        code = _unwritable(error)
    except Exception as error:
        # typer keeps its usage errors to itself, and they moved between its versions: known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        if told := error.format_message():  # nothing is told where help was shown instead
            fail(f"{told} ({_place(error)} --help shows how)")
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _unwritable(error: OSError) -> int:
    """Exit code of a run whose output is full, or has been closed as `head` does; that is no failure to tell of."""
    # Nothing more is written there, not even while the interpreter shuts down.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 141
    fail(f"the output cannot be written: {error.strerror}")
    return 1


def _place(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "archcompass"
