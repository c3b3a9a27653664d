"""A model's YAML: read, written and checked. `archcompass: 1` heads every file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from archcompass.blocks.base import explain
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import FileFormatError

VERSION = 1

MAX_FILE_BYTES = 4 * 2**20

MAX_YAML_LETTERS = 2**18
"""The largest published model takes a two-hundredth of this; reading so much takes about a second."""


def dump(spec: ModelSpec) -> dict[str, Any]:
    """The file's content as plain data, defaults left out, header first."""
    body = spec.model_dump(mode="json", exclude_defaults=True)
    order = ["name", "hidden_size", "vocab_size", "layers", "blocks"]
    return {"archcompass": VERSION, **{key: body[key] for key in order if key in body}, **body}


def to_yaml(spec: ModelSpec) -> str:
    """The file's text."""
    return yaml.safe_dump(dump(spec), sort_keys=False, width=110, allow_unicode=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: into a neighbour, then renamed over.

    Raises:
        FileFormatError: the folder cannot be written to.
    """
    write_texts(path.parent, {path.name: text})


def write_texts(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    """Writes named files, all of them whole or, when one cannot be written, none. Another writer of the folder is waited for.

    Raises:
        FileFormatError: the folder cannot be written to, or is full.
    """
    import tempfile

    written: dict[str, Path] = {}
    name = next(iter(contents))
    try:
        with _alone(folder):
            _sweep(folder, contents)
            for name, text in contents.items():
                handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
                written[temporary] = folder / name
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(temporary, 0o644)
            for temporary, path in written.items():
                os.replace(temporary, path)
    except OSError as error:
        raise FileFormatError(f"{folder / name} cannot be written: {error.strerror}") from error
    finally:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
    return list(written.values())


def _sweep(folder: Path, names: Iterable[str]) -> None:
    """Removes what a killed writer left half-written. Nobody else is writing here."""
    for path in (path for name in names for path in folder.glob(f".{glob.escape(name)}.????????")):
        path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other writers of ours out of a folder; leaves nothing behind, also when it is killed."""
    try:
        import fcntl
    except ImportError:
        yield  # Windows cannot lock a folder: each file is whole, two sets at once may mix.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_folder(folder: Path) -> None:
    """Whether files could be written to a folder that may not be there yet: asked before work of minutes, nothing is made.

    Raises:
        FileFormatError: something is in the way, or may not be written to.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise FileFormatError(f"{folder} cannot be made: {nearest} is no folder")
    if not os.access(nearest, os.W_OK):
        raise FileFormatError(f"{folder} cannot be written to: {nearest} is read-only for you")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, if need be.

    Raises:
        FileFormatError: something is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be made: {error.strerror}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        FileFormatError: missing, too large, no text, tagged, empty, or no mapping.
    """
    text = read_text(path)
    if len(text) > MAX_YAML_LETTERS:
        raise FileFormatError(
            f"{path.name} is {len(text):,} letters of YAML; the most this program reads is {MAX_YAML_LETTERS:,}"
        )
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FileFormatError(f"{path.name} is no plain YAML: {_first_line(error)}") from error
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise FileFormatError(f"{path.name} is {found}; it must be a mapping of keys to values")
    if not all(isinstance(key, str) for key in data):
        odd = next(key for key in data if not isinstance(key, str))
        raise FileFormatError(f"{path.name}: the key {odd!r} is not a word")
    return data


def read_text(path: Path) -> str:
    """The text of a file of sensible size.

    Raises:
        FileFormatError: missing, a folder, unreadable, too large, or no text.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FileFormatError(
                f"{path.name} is {size:,} bytes; the largest this program reads is {MAX_FILE_BYTES:,}"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path.name} is not text (byte {error.start} is no UTF-8)") from error
    if "\0" in text:
        raise FileFormatError(f"{path.name} is not text (it holds zero bytes)")
    if text.count("*") and _alias_bomb(text):
        raise FileFormatError(f"{path.name} uses YAML aliases; write the values out")
    return text


def parse(data: dict[str, Any], where: str = "") -> ModelSpec:
    """The model that a file's mapping describes.

    Raises:
        FileFormatError: no header, or one of another version.
        SpecError: a field is unknown, missing or impossible.
    """
    version = data.get("archcompass")
    if version != VERSION:
        said = "is missing" if version is None else f"is {version!r}"
        raise FileFormatError(f"{where or 'the model'}: the header 'archcompass: {VERSION}' {said}")
    try:
        return ModelSpec.model_validate({key: value for key, value in data.items() if key != "archcompass"})
    except ValidationError as error:
        raise explain(error, where, ModelSpec.model_fields) from error


def load(source: str | Path) -> ModelSpec:
    """A model from a YAML path, a config.json or its folder, a published name, or a hub id ("org/name").

    Raises:
        UnknownNameError: neither a file nor a published model.
        FileFormatError, SpecError, ConversionError: what is wrong with the file.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".json":
        from archcompass.blocks.hf import load_config

        return load_config(path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return parse(read_mapping(path), path.name)
    if "/" in str(source):
        from archcompass.blocks.hf import load_hub

        return load_hub(str(source))
    from archcompass.blocks.zoo import published

    return published(str(source))


def _alias_bomb(text: str) -> bool:
    """Whether the text refers to anchors: no file of ours needs them, and a few can stand for gigabytes."""
    try:
        return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError):
        return False


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
