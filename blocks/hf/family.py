"""What a family of checkpoints is, and the pieces that most of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from archcompass.blocks.base import Block
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.model.pattern import compress
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.errors import ConversionError

if TYPE_CHECKING:
    from archcompass.blocks.hf.weights import Weight

SomeBlock = TypeVar("SomeBlock", bound=Block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type`.

    Attributes:
        model_type: HF's name.
        architecture: HF's class, written into `architectures`.
        read: the configuration's keys -> the model. Takes every key it understands.
        write: the model -> the configuration's keys that differ between models of the family. It may assume its own
            kind of model and raise `ConversionError`: what it writes is read back and compared with what was asked.
        weights: the model -> every tensor of ours with the tensors of the checkpoint it is made from. Where checkpoints
            differ, a tensor may be listed again: the first entry that a checkpoint can fill is read, the first is written.
        no_effect: keys that have no effect in this family.
        aliases: other spellings of keys, and the ones that `read` asks for.
        unused: patterns of tensors in published checkpoints that the language model does not use.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    weights: Callable[[ModelSpec], Iterable[Weight]]
    no_effect: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = field(default=(r".*rotary_emb\.inv_freq$",))


class Part(NamedTuple):
    """One residual sublayer of a layer: a short name, the block, and how it joins when that differs from the model's."""

    name: str
    block: Block
    residual: Residual | None = None


def stack(layers: Sequence[Sequence[Part]]) -> dict[str, Any]:
    """`blocks`, `layers` and `residuals` of a model with these layers; equal parts share a name."""
    names: dict[tuple[str, str], str] = {}
    blocks: dict[str, Block] = {}
    residuals: dict[str, Residual] = {}
    for part in (part for layer in layers for part in layer):
        key = _identity(part)
        if key in names:
            continue
        taken = [name for (base, _), name in names.items() if base == part.name]
        names[key] = part.name if not taken else f"{part.name}_{len(taken) + 1}"
        blocks[names[key]] = part.block
        if part.residual is not None:
            residuals[names[key]] = part.residual
    pattern = compress(tuple(tuple(names[_identity(part)] for part in layer) for layer in layers))
    return {"blocks": blocks, "layers": pattern, "residuals": residuals}


def _identity(part: Part) -> tuple[str, str]:
    joined = "" if part.residual is None else part.residual.model_dump_json()
    return part.name, part.block.model_dump_json() + joined


class Place(NamedTuple):
    """Where a sublayer stands: its layer, its index among all sublayers, its place within the layer, and the block."""

    layer: int
    sublayer: int
    part: int
    name: str
    block: Block

    @property
    def ours(self) -> str:
        """Prefix of its tensors in the `LanguageModel`."""
        return f"layers.{self.sublayer}"


def places(spec: ModelSpec) -> Iterator[Place]:
    """Every sublayer, in order."""
    index = 0
    for layer, names in enumerate(spec.expanded):
        for part, name in enumerate(names):
            yield Place(layer, index, part, name, spec.blocks[name])
            index += 1


def blocks_of(spec: ModelSpec, kind: type[SomeBlock]) -> list[SomeBlock]:
    """The blocks of one class, in the order of `spec.blocks`."""
    return [block for block in spec.blocks.values() if isinstance(block, kind)]


def first(spec: ModelSpec, kind: type[SomeBlock], family: str) -> SomeBlock:
    """The first block of a class.

    Raises:
        ConversionError: the model has none.
    """
    found = blocks_of(spec, kind)
    if not found:
        raise ConversionError(f"blocks has no {kind.label or kind.__name__}, and every {family} model has one")
    return found[0]


def norm_eps(spec: ModelSpec) -> float:
    """The epsilon of the model's norms, read off the residual's."""
    return float(getattr(spec.residual.norm, "eps", 1e-6))


def sizes(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields that every language model has."""
    return {
        "model_type": fields.model_type,
        "hidden_size": fields.integer("hidden_size", defaults.get("hidden_size")),
        "vocab_size": fields.integer("vocab_size", defaults.get("vocab_size")),
        "max_position_embeddings": fields.integer("max_position_embeddings", defaults.get("max_position_embeddings")),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
    }


def written_sizes(spec: ModelSpec) -> dict[str, Any]:
    """The same fields on their way back."""
    written = {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    return {key: value for key, value in written.items() if value is not None}


def periodic(count: int, kind: Callable[[int], Sequence[Part]]) -> list[Sequence[Part]]:
    """The layers `kind(0) ... kind(count - 1)`."""
    return [kind(layer) for layer in range(count)]
