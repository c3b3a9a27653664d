"""Flags that several commands share. The workload's flags are made from the workload's own fields, so none can be missing."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from archcompass.advisor.workload import Workload

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


def with_workload_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds one flag for each workload key. The command receives `flags`, those that were given, as a dictionary."""
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "flags"
    ]
    made = [_flag(name, field) for name, field in Workload.model_fields.items()]

    @functools.wraps(command)
    def wrapper(**everything: Any) -> Any:
        given = {name: everything.pop(name) for name in Workload.model_fields}
        flags = {name: value for name, value in given.items() if value is not None}
        return command(**everything, flags=flags)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *made] if parameter is not None
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapper.__wrapped__
    return wrapper


def _flag(name: str, field: Any) -> inspect.Parameter:
    dashed = name.replace("_", "-")
    is_switch = field.annotation is bool
    option: Any = typer.Option(
        f"--{dashed}/--no-{dashed}" if is_switch else f"--{dashed}",
        help=field.description,
        metavar=None if is_switch else "VALUE",
        show_default=False,
        rich_help_panel="Workload",
    )
    kind: Any = bool | None if is_switch else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def read_sample(path: Path | None, bytes_per_token: float, tokenizer: Path | None) -> Sample | None:
    """What a sample of documents says; None without one.

    Raises:
        FileFormatError, InputError: it cannot be read or measured.
    """
    if path is None:
        return None
    from archcompass.advisor.sample import measure

    return measure(path, bytes_per_token=bytes_per_token, tokenizer=tokenizer)


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
