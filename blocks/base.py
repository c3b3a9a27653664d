"""The block contract: what every block says about itself, without torch.

A block is a frozen description of one part of a network. It knows its parameters, its state, its work and its traits, and
it can build the `nn.Module` that does that work. The width it acts on is the model's, so it is handed in and never stored.

The terms it speaks in, `Step`, `Op` and the rest, are those of `blocks.terms`, given here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)

from archcompass.blocks.terms import (
    Live,
    Op,
    OpKind,
    Parameters,
    Role,
    StateTensor,
    Step,
    Traits,
    costed,
    gemm,
    pointwise,
    shared_heads,
)
from archcompass.errors import SpecError, UnknownNameError, nearest

if TYPE_CHECKING:
    from archcompass.blocks.runtime import BlockModule


class Block(BaseModel):
    """One part of a network: frozen, keyword-only, unknown keys refused.

    A subclass gives `kind: Literal["name"] = "name"` and is registered under that name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    label: ClassVar[str] = ""
    """What a person calls it: "grouped-query attention"."""

    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            return
        known = BLOCKS.get(kind)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(f"block kind {kind!r} is defined twice: {known.__module__} and {cls.__module__}")
        BLOCKS[kind] = cls

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`kind` is a default, yet no reader can do without it: it is written even where defaults are left out."""
        return {"kind": self.kind, **handler(self)}

    @property
    def traits(self) -> Traits:
        """What rules may ask of this block."""
        raise TypeError(f"{type(self).__name__} does not state its traits")

    def parameters(self, width: int) -> Parameters:
        """Learned numbers at `width` channels."""
        raise TypeError(f"{type(self).__name__} does not state its parameters")

    def own_parameters(self, width: int) -> Parameters:
        """The part of `parameters` that every place has for itself where a model shares this block's weights."""
        return Parameters()

    def work(self, width: int, step: Step) -> list[Op]:
        """What the machine runs in one call."""
        raise TypeError(f"{type(self).__name__} does not state its work")

    def state(self, width: int, context: int) -> list[StateTensor]:
        """Tensors that live between steps once `context` tokens have been seen, for one sequence."""
        return []

    def live(self, width: int, step: Step) -> Live:
        """Activation memory of one call; every product's output is kept for the backward pass unless a block knows better.

        Counted on the forward pass alone: the work of a training step holds the backward's traffic too, which is not memory.
        """
        operations = self.work(width, replace(step, training=False))
        largest = max((op.activation_bytes for op in operations), default=0)
        saved = sum(op.activation_bytes * op.count for op in operations) if step.training else 0
        return Live(peak_bytes=largest, saved_bytes=saved, backward_bytes=largest * step.training)

    def share(self, cards: int) -> Self:
        """The part that each of `cards` computes where they share every product (tensor parallel): some heads, some hidden
        channels. A block that does not say is counted whole on each, which errs high."""
        return self

    def check(self, width: int) -> None:
        """Refuses a width this block cannot act on.

        Raises:
            SpecError: names the field, the value and the rule.
        """

    def build(self, width: int, layer: int = 0) -> BlockModule:
        """The `nn.Module`, on torch's current default device and dtype. `layer` is the depth it will stand at."""
        self.check(width)
        module = import_module(type(self).__module__.removesuffix("spec") + "module")
        built: BlockModule = module.build(self, width, layer)
        return built

    @classmethod
    def tiny(cls) -> list[Self]:
        """Small instances that together exercise every option, for TINY_WIDTH channels; the contract tests run over them."""
        raise TypeError(f"{cls.__name__} offers no tiny instances")

    @classmethod
    def typical(cls) -> tuple[Self, int] | None:
        """An instance of ordinary size and its width, which `archcompass calibrate` runs; None leaves it to its op kinds."""
        return None

    @classmethod
    def other_sizes(cls) -> list[Self]:
        """Like the ordinary instance with smaller heads, for blocks where those take longer than their FLOPs say."""
        return []


TINY_WIDTH = 64
"""The width that the instances of `Block.tiny` act on."""

MOST_DIVISORS_TRIED = 1_000_000
"""Enough for sizes up to 10^12; of larger ones, which no model has, the nearest may lie nearer than the one named."""

BLOCKS: dict[str, type[Block]] = {}
"""Every block class by kind. Filled by `known_blocks`."""


@cache
def known_blocks() -> dict[str, type[Block]]:
    """All block classes by kind: ours, then those other packages offer under the entry point `archcompass.blocks`."""
    here = Path(__file__).parent
    for spec in sorted(here.glob("*/spec.py")):
        import_module(f"archcompass.blocks.{spec.parent.name}.spec")
    from importlib.metadata import entry_points

    for point in entry_points(group="archcompass.blocks"):
        point.load()
    return dict(sorted(BLOCKS.items()))


def block_class(kind: str) -> type[Block]:
    """The block class called `kind`; imports only its own file when it is one of ours.

    Raises:
        UnknownNameError: no block is called so; lists the nearest kinds.
    """
    if kind not in BLOCKS and kind.isidentifier():
        _import_own(kind)
    if kind not in BLOCKS and kind not in known_blocks():
        raise UnknownNameError("block kind", kind, known_blocks())
    return BLOCKS[kind]


def _import_own(kind: str) -> None:
    """Imports the folder that `kind` is named after, whole or by its first word ("rwkv6_time_mix"), if there is one."""
    for folder in (kind, kind.partition("_")[0]):
        if (Path(__file__).parent / folder / "spec.py").is_file():
            import_module(f"archcompass.blocks.{folder}.spec")
            return


def _resolve(value: Any, _handler: ValidatorFunctionWrapHandler) -> Block:
    if isinstance(value, Block):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise SpecError(f"a block is a mapping with a 'kind'; got {str(value)[:80]!r}")
    found = block_class(value["kind"])
    try:
        return found.model_validate(value)
    except ValidationError as error:
        raise explain(error, fields=found.model_fields) from error


AnyBlock = Annotated[SerializeAsAny[Block], WrapValidator(_resolve)]
"""A field that holds any registered block, parsed by its `kind`."""


def must_divide(field: str, value: int, whole: str, size: int) -> None:
    """Refuses a field that does not divide another, and names the nearest value that does.

    Raises:
        SpecError: it does not.
    """
    if size % value == 0:
        return
    small = [n for n in range(1, min(math.isqrt(size), MOST_DIVISORS_TRIED) + 1) if size % n == 0]
    best = min((*small, *(size // n for n in reversed(small))), key=lambda n: abs(n - value))
    raise SpecError(f"{field} ({value}) must divide {whole} ({size}); nearest: {best}")


def explain(error: ValidationError, where: str = "", fields: Iterable[str] = ()) -> SpecError:
    """One line for a person, from pydantic's report: the place, the value, the rule, the nearest field when one is unknown."""
    errors = error.errors()
    # A misspelt field is also a missing one; the misspelling is what helps.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    path = ".".join(str(part) for part in first["loc"])
    place = ": ".join(part for part in (where, path) if part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        close = nearest(str(first["loc"][-1]), fields, count=1)
        return SpecError(f"{place} is not a field here" + (f"; did you mean {close[0]!r}?" if close else ""))
    if first["type"] == "missing":
        return SpecError(f"{place} is missing")
    if first["type"] == "value_error":
        return SpecError(f"{place}: {message}" if place else message)
    return SpecError(f"{place} is {repr(first['input'])[:80]}: {message}")


__all__ = [
    "BLOCKS",
    "TINY_WIDTH",
    "AnyBlock",
    "Block",
    "Live",
    "Op",
    "OpKind",
    "Parameters",
    "Role",
    "StateTensor",
    "Step",
    "Traits",
    "block_class",
    "costed",
    "explain",
    "gemm",
    "known_blocks",
    "must_divide",
    "pointwise",
    "shared_heads",
]
