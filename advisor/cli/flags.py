"""Flags that several commands share. The workload's flags are made from the workload's own fields, so none can be missing."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from archcompass.advisor import units
from archcompass.advisor.workload import Workload
from archcompass.errors import InputError

if TYPE_CHECKING:
    from archcompass.advisor.sample import Sample

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's YAML, an HF config.json or its folder, a published name, or a hub id (org/name).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="The table as Markdown, to paste into an issue.")]
Effort = Annotated[
    Literal["normal", "high"],
    typer.Option("--effort", help="high: also what could be had instead, better, smaller or faster; takes seconds."),
]
SampleFile = Annotated[
    Path | None,
    typer.Option(
        "--sample",
        metavar="FILE",
        help="Your own documents (JSON lines, text, a folder): measures context and breadth; flags override.",
        show_default=False,
    ),
]
BytesPerToken = Annotated[
    float, typer.Option("--bytes-per-token", help="What a token of the sample takes; English about 4, code 3.3.")
]
Tokenizer = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="Counts the sample with this tokenizer.json.", show_default=False),
]
WorkloadFile = Annotated[
    Path | None,
    typer.Argument(metavar="[WORKLOAD.yaml]", help="A workload file; flags override its keys.", show_default=False),
]


def option(name: str, help: str, **how: Any) -> Any:
    """A flag without a default that its help should show."""
    return typer.Option(name, help=help, show_default=False, **how)


def flag(name: str, help: str, kind: type = str, spelled: str = "", **how: Any) -> inspect.Parameter:
    """The flag of a keyword, for `with_flags`: its name with dashes unless `spelled` otherwise; None where it is not given."""
    dashed = f"--{name.replace('_', '-')}"
    usual = f"{dashed}/--no-{dashed[2:]}" if kind is bool else dashed
    how = how if kind is bool else {"metavar": "VALUE"} | how
    asked: Any = Annotated[kind | None, option(spelled or usual, help, **how)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=asked)


def with_flags(made: Sequence[inspect.Parameter]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command the flags `made`, where its parameter `flags` stands: those that were given, as a dictionary."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**everything: Any) -> Any:
            given = {each.name: everything.pop(each.name) for each in made}
            return command(**everything, flags={name: value for name, value in given.items() if value is not None})

        own = inspect.signature(command, eval_str=True).parameters
        parameters = [each for name in own for each in (made if name == "flags" else [own[name]])]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        del wrapper.__wrapped__
        return wrapper

    return decorated


with_workload_flags = with_flags(
    [
        flag(name, str(field.description), bool if field.annotation is bool else str, rich_help_panel="Workload")
        for name, field in Workload.model_fields.items()
    ]
)
"""Adds one flag for each workload key."""


def read_sample(path: Path | None, bytes_per_token: float, tokenizer: Path | None) -> Sample | None:
    """What a sample of documents says; None without one.

    Raises:
        FileFormatError, InputError: it cannot be read or measured.
    """
    if path is None:
        return None
    from archcompass.advisor.sample import measure

    return measure(path, bytes_per_token=bytes_per_token, tokenizer=tokenizer)


def whole(name: str, text: str, low: int = 1) -> int:
    """A whole number as people write tokens, `low` or more.

    Raises:
        InputError: it is none; names the flag.
    """
    try:
        return units.tokens(text, low=low, unit="")
    except InputError as error:
        raise InputError(f"--{name} {error}") from error


def spoken(path: Path | None, flags: dict[str, Any]) -> str:
    """The question as it is typed after a command's name: a file, then flags."""
    words = [] if path is None else [str(path)]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def read_workload(path: Path | None, flags: dict[str, Any]) -> Workload:
    """The workload of a file with flags laid over it.

    Raises:
        InputError: what is wrong, and where: the file's name for its keys, the flag for a flag.
    """
    if path is None:
        return Workload(**flags)
    from archcompass.blocks.model.files import read_mapping

    data = read_mapping(path)
    workload = Workload.from_mapping(data, path.name)
    return Workload.from_mapping(data | flags) if flags else workload
