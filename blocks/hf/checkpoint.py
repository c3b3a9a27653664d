"""Weights of a Hugging Face folder: config.json and *.safetensors, one file or many, to a `LanguageModel` and back.

The model is built on `meta` and its parameters are assigned. A tensor that is the same on both sides stays a view of the
mapped file, in the file's dtype; a tensor that ours joins from several is filled piece by piece, and each piece's mapping
is closed before the next is opened. So the memory is that of the weights and one piece. Only safetensors is read: the
older format runs code.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from archcompass.blocks.hf.configuration import family, name_of, read_config, read_json, to_config
from archcompass.blocks.hf.family import Family
from archcompass.blocks.hf.weights import Same, Weight
from archcompass.blocks.model.files import write_text
from archcompass.blocks.model.module import LanguageModel
from archcompass.errors import ConversionError, FileFormatError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MAX_SHARD_BYTES = 4 * 2**30

_TIED_HEAD = ("head.weight", "embedding.weight")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def load_pretrained(folder: str | Path) -> LanguageModel:
    """The model of a folder, with its weights, on the CPU, in the dtype they are stored in.

    Raises:
        FileFormatError: no configuration, no safetensors, a shard that is missing, damaged or outside the folder, a tensor
            that is missing, left over or of another shape; names it.
        ConversionError: a configuration this package cannot say, or quantised weights.
    """
    file, config = read_json(folder)
    if config.get("quantization_config"):
        raise ConversionError(
            "quantization_config is set: quantised tensors are not read here; use unquantised weights"
        )
    spec = read_config(config).model_copy(update={"name": name_of(file.resolve().parent.name)})
    chosen = family(str(config["model_type"]))
    shards = Shards(file.parent)
    table = _present(chosen.weights(spec), shards.files)
    left = _left(shards, table, chosen, _predicting_layers(chosen, config, spec.num_hidden_layers))
    _check_left(shards, table, left, tied=spec.tie_word_embeddings)
    model = LanguageModel.from_spec(spec, device="meta")
    expected = model.state_dict()
    model.load_state_dict(_filled(shards, table, expected), assign=True)
    _start_counters(model, expected)
    _check_whole(model)
    return model.eval()


def save_pretrained(model: LanguageModel, folder: str | Path, model_type: str | None = None) -> None:
    """Writes config.json and the weights, in shards of at most 4 GiB, so that transformers opens the folder.

    Raises:
        ConversionError: no family (or not the one named) can say this model; names the field.
        FileFormatError: the folder cannot be written to.
    """
    target = Path(folder)
    config = to_config(model.spec, model_type)
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(f"{target} cannot be made: {error.strerror}") from error
    state = model.state_dict()
    table = _present(family(str(config["model_type"])).weights(model.spec), ())
    _write_shards(target, _plan(table, state), state)
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


class Shards:
    """The safetensors files of a folder: which tensor is where. Every access maps the file anew, so nothing lingers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for path in self._paths():
            for name in _keys(path):
                if name in self.files:
                    raise FileFormatError(f"{name} is both in {self.files[name].name} and in {path.name}")
                self.files[name] = path
        self._check_index()

    def _paths(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            return [self._inside(name) for name in sorted(set(self._index().values()))]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) != 1:
            several = f"{len(found)} safetensors files and no {INDEX}" if found else "no safetensors file"
            raise FileFormatError(f"{self.folder} holds {several}; expected {SINGLE}, or shards with {INDEX}")
        return found

    def _index(self) -> dict[str, str]:
        _, content = read_json(self.folder / INDEX)
        entries = content.get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
            raise FileFormatError(f"{INDEX}: weight_map must map tensor names to file names")
        return entries

    def _inside(self, name: str) -> Path:
        """A shard beside its index; a snapshot's link to the file itself is fine, a path elsewhere is not."""
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FileFormatError(f"{INDEX} names {name!r}; a shard is a .safetensors file in the same folder")
        path = self.folder / name
        if not path.is_file():
            raise FileFormatError(f"{INDEX} names {name}, which is not in {self.folder}")
        return path

    def _check_index(self) -> None:
        if not (self.folder / INDEX).is_file():
            return
        for name, file in self._index().items():
            if self.files.get(name) != self.folder / file:
                raise FileFormatError(f"{INDEX} says {name} is in {file}, and it is not there")

    def read(self, name: str) -> Tensor:
        """One tensor, a view of a mapping of its own."""
        path = self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise FileFormatError(f"{path.name} is no sound safetensors file: {error}") from error
        return tensor


class _Parts(Sequence[Tensor]):
    """The checkpoint's tensors of one of ours, read when they are asked for."""

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        self.shards, self.names = shards, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> _Parts: ...

    def __getitem__(self, index: int | slice) -> Tensor | _Parts:
        if isinstance(index, slice):
            return _Parts(self.shards, self.names[index])
        return self.shards.read(self.names[index])


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path.name} is no sound safetensors file: {error}") from error


def _present(table: Iterable[Weight], names: Container[str]) -> list[Weight]:
    """One entry for each tensor of ours: the first whose tensors are all there, else the first."""
    chosen: dict[str, Weight] = {}
    whole: set[str] = set()
    for weight in table:
        if weight.ours in whole:
            continue
        if all(name in names for name in weight.theirs):
            whole.add(weight.ours)
            chosen[weight.ours] = weight
        chosen.setdefault(weight.ours, weight)
    return list(chosen.values())


def _predicting_layers(chosen: Family, config: Mapping[str, Any], depth: int) -> range:
    """Layers after the model's own that some checkpoints hold (DeepSeek-V3, GLM-4.5), which predict further tokens."""
    asked = "num_nextn_predict_layers"
    spelled = [asked, *(name for name, key in chosen.aliases.items() if key == asked)]
    counts = (config.get(name) for name in spelled)
    return range(depth, depth + max((count for count in counts if isinstance(count, int)), default=0))


def _left(shards: Shards, table: Sequence[Weight], chosen: Family, further: range) -> list[str]:
    """Tensors of the checkpoint that the model has no place for, without those of which that is known."""
    needed = {name for weight in table for name in weight.theirs}
    if missing := sorted(needed - set(shards.files)):
        raise FileFormatError(f"{shards.folder.name} lacks {_listed(missing)}")
    unused = re.compile("|".join(f"(?:{one})" for one in chosen.unused))
    left = (name for name in set(shards.files) - needed if not unused.match(name))
    return sorted(name for name in left if not ((layer := _LAYER.match(name)) and int(layer[1]) in further))


def _check_left(shards: Shards, table: Sequence[Weight], left: Sequence[str], tied: bool) -> None:
    if tied and left == ["lm_head.weight"]:
        table_name = next(weight.theirs[0] for weight in table if weight.ours == _TIED_HEAD[1])
        if torch.equal(shards.read("lm_head.weight"), shards.read(table_name)):
            return
        raise FileFormatError("lm_head.weight differs from the embedding, and tie_word_embeddings says they are one")
    if left:
        raise FileFormatError(f"{shards.folder.name} holds {_listed(left)}, which this model has no place for")


def _filled(shards: Shards, table: Sequence[Weight], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of ours; what stands in several places is read once."""
    made: dict[tuple[str, ...], Tensor] = {}
    for weight in table:
        if weight.theirs not in made:
            made[weight.theirs] = _tensor(shards, weight, expected)
    return {weight.ours: made[weight.theirs] for weight in table}


def _tensor(shards: Shards, weight: Weight, expected: Mapping[str, Tensor]) -> Tensor:
    parts = _Parts(shards, weight.theirs)
    try:
        tensor = weight.form.join(parts)
    except (RuntimeError, IndexError) as error:
        raise FileFormatError(f"{_listed(weight.theirs)} cannot become {weight.ours}: {error}") from error
    shape = expected[weight.ours].shape
    if tensor.shape != shape:
        raise FileFormatError(
            f"{_listed(weight.theirs)} give {weight.ours} the shape {list(tensor.shape)}; "
            f"the configuration says {list(shape)}"
        )
    return tensor


def _start_counters(model: LanguageModel, saved: Container[str]) -> None:
    """Buffers that no checkpoint keeps count what a run does; they start at zero."""
    for name, buffer in list(model.named_buffers()):
        if name not in saved and buffer.is_meta:
            home, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(home), leaf, torch.zeros_like(buffer, device="cpu"))


def _check_whole(model: LanguageModel) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise FileFormatError(f"{name} was given no values by this family's table")


def _plan(table: Sequence[Weight], state: Mapping[str, Tensor]) -> list[list[Weight]]:
    """Entries per shard, each shard at most `MAX_SHARD_BYTES` unless one tensor alone is larger."""
    shards: list[list[Weight]] = [[]]
    room = MAX_SHARD_BYTES
    once = {weight.theirs: weight for weight in reversed(table)}
    for weight in reversed(once.values()):
        size = state[weight.ours].nbytes
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(weight)
        room -= size
    return shards


def _write_shards(target: Path, plan: Sequence[Sequence[Weight]], state: Mapping[str, Tensor]) -> None:
    index: dict[str, str] = {}
    for number, entries in enumerate(plan, start=1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = dict(_pieces(entries, state))
        _save(tensors, target / name)
        index |= dict.fromkeys(tensors, name)
    if len(plan) > 1:
        total = sum(state[weight.ours].nbytes for entries in plan for weight in entries)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        write_text(target / INDEX, text + "\n")
    else:
        (target / INDEX).unlink(missing_ok=True)


def _pieces(entries: Sequence[Weight], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for weight in entries:
        tensor = state[weight.ours].detach()
        pieces = [tensor] if isinstance(weight.form, Same) else weight.form.split(tensor)
        yield from ((name, piece.contiguous()) for name, piece in zip(weight.theirs, pieces, strict=True))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Whole or not at all: into a neighbour, then renamed over, since `path` may be mapped by the very model."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        Path(temporary).unlink(missing_ok=True)
        raise FileFormatError(f"{path} cannot be written: {error}") from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
