"""A model as data: an embedding, residual sublayers given by named blocks and a compact pattern, a norm and a head.

    h = embed(ids);   for every sublayer:  h = skip · h + multiplier · post_norm(block(pre_norm(h)));   logits = head(norm(h))

It sums what its blocks say, and knows nothing about any of them.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from archcompass.blocks.base import AnyBlock, Block, Live, Op, Parameters, StateTensor, Step, Traits, pointwise
from archcompass.blocks.embedding.spec import Embedding, Head
from archcompass.blocks.model.pattern import Layer, expand
from archcompass.blocks.norm.spec import RMSNorm
from archcompass.errors import SpecError, nearest

if TYPE_CHECKING:
    import torch

    from archcompass.blocks.model.module import LanguageModel


class Residual(BaseModel):
    """How a sublayer joins the residual stream.

    Attributes:
        position: the norm stands before the block ("pre"), after it and before the sum ("post"), on both sides
            ("sandwich", Gemma), or nowhere.
        norm: the norm itself.
        multiplier: on what the block says (Granite's residual_multiplier).
        skip_multiplier: on the stream it is added to (MiniMax's alpha).
        skip: what the block's output is added to: the stream, or the normed input of the block (MiniMax).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    position: Literal["pre", "post", "sandwich", "none"] = "pre"
    norm: AnyBlock = Field(default_factory=RMSNorm)
    multiplier: float = 1.0
    skip_multiplier: float = 1.0
    skip: Literal["stream", "normed"] = "stream"

    @field_validator("norm")
    @classmethod
    def _is_a_norm(cls, value: Block) -> Block:
        return _norm(value)

    @property
    def norms(self) -> int:
        """How many norms a sublayer has."""
        return {"pre": 1, "post": 1, "sandwich": 2, "none": 0}[self.position]


class ModelSpec(BaseModel):
    """A language model, described wholly. Field names are HF's wherever HF has one.

    Attributes:
        name: what it is called.
        model_type: HF's name for the family it came from; says which family an export takes when several could say it.
        hidden_size: width of the residual stream.
        vocab_size: tokens.
        max_position_embeddings: the context it is meant for; None when nothing bounds it.
        tie_word_embeddings: the head shares the embedding's table.
        embedding_multiplier: constant on the embeddings, "sqrt_width" for √hidden_size.
        embedding_norm: a LayerNorm right after the table (RWKV).
        logit_multiplier, logit_soft_cap: what happens to the logits.
        blocks: the blocks by name.
        layers: the pattern over those names (see pattern.py); depth is derived.
        residual: how sublayers join the stream; `residuals` says otherwise for a named block.
        norm: the final norm, or None.
        shared: names whose weights are one and the same at every place they stand (Zamba2), but for what the block says
            every place has for itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    name: str = Field(default="model", max_length=200)
    model_type: str | None = Field(default=None, max_length=80)
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool = False
    embedding_multiplier: float | Literal["sqrt_width"] = 1.0
    embedding_norm: bool = False
    logit_multiplier: float = 1.0
    logit_soft_cap: PositiveFloat | None = None
    blocks: dict[str, AnyBlock]
    layers: str
    residual: Residual = Field(default_factory=Residual)
    residuals: dict[str, Residual] = Field(default_factory=dict)
    norm: AnyBlock | None = Field(default_factory=RMSNorm)
    shared: tuple[str, ...] = ()

    @field_validator("name", "model_type")
    @classmethod
    def _can_be_printed(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise SpecError(f"{value[:40]!r} holds a character that cannot be printed; write a name of plain letters")
        return value

    @field_validator("layers")
    @classmethod
    def _pattern_is_sound(cls, value: str) -> str:
        expand(value)
        return value

    @field_validator("norm")
    @classmethod
    def _is_a_norm(cls, value: Block | None) -> Block | None:
        return value if value is None else _norm(value)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        used = {name for layer in self.expanded for name in layer}
        for name in sorted(used | set(self.residuals) | set(self.shared)):
            if name not in self.blocks:
                hint = f"; did you mean {nearest(name, self.blocks)[0]!r}?" if nearest(name, self.blocks) else ""
                raise SpecError(f"layers name a block {name!r}, but blocks has {sorted(self.blocks)}{hint}")
        if idle := sorted(set(self.blocks) - used):
            raise SpecError(f"blocks.{idle[0]} is never used by layers {self.layers!r}; remove it or name it there")
        for name, block in self.blocks.items():
            if block.traits.role not in ("mixer", "channel"):
                raise SpecError(f"blocks.{name} is a {block.traits.role}; a layer is made of mixers and channel blocks")
            block.check(self.hidden_size)
        return self

    @cached_property
    def expanded(self) -> tuple[Layer, ...]:
        """Every layer, as the names of its sublayers."""
        return expand(self.layers)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How often each named block stands in the model."""
        counter = Counter(name for layer in self.expanded for name in layer)
        return {name: counter[name] for name in self.blocks}

    @property
    def num_hidden_layers(self) -> int:
        """Depth."""
        return len(self.expanded)

    @cached_property
    def embedding(self) -> Embedding:
        """The input end as a block."""
        return Embedding(vocab_size=self.vocab_size, multiplier=self.embedding_multiplier, norm=self.embedding_norm)

    @cached_property
    def head(self) -> Head:
        """The output end as a block."""
        return Head(
            vocab_size=self.vocab_size,
            tied=self.tie_word_embeddings,
            multiplier=self.logit_multiplier,
            soft_cap=self.logit_soft_cap,
        )

    def residual_of(self, name: str) -> Residual:
        """How the block called `name` joins the stream."""
        return self.residuals.get(name, self.residual)

    def traits(self) -> dict[str, Traits]:
        """Traits of each named block."""
        return {name: block.traits for name, block in self.blocks.items()}

    def parameters(self) -> Parameters:
        """Learned numbers of the whole model; tied and shared weights count once."""
        return self.counted

    @cached_property
    def counted(self) -> Parameters:
        """`parameters()`, counted once: a frozen model never changes."""
        width = self.hidden_size
        total = self.embedding.parameters(width) + self.head.parameters(width)
        if self.tie_word_embeddings:
            total = Parameters(vector=total.vector, head=total.table)
        if self.norm is not None:
            total = total + self.norm.parameters(width)
        for name, count in self.counts.items():
            residual = self.residual_of(name)
            block = self.blocks[name]
            if name in self.shared:
                total = total + block.parameters(width) + block.own_parameters(width) * (count - 1)
            else:
                total = total + block.parameters(width) * count
            total = total + residual.norm.parameters(width) * (residual.norms * count)
        return total

    def state(self, context: int) -> list[tuple[str, int, list[StateTensor]]]:
        """(block name, how many of it, its state after `context` tokens for one sequence), for blocks that keep any."""
        found = [(name, n, self.blocks[name].state(self.hidden_size, context)) for name, n in self.counts.items()]
        return [(name, n, tensors) for name, n, tensors in found if tensors]

    def state_bytes(self, step: Step) -> float:
        """Bytes of all state of one sequence after `step`."""
        kept = self.state(step.context)
        return sum(count * sum(tensor.bytes(step) for tensor in tensors) for _, count, tensors in kept)

    def work(self, step: Step) -> list[Op]:
        """Everything a machine runs in one call; equal blocks are one entry with a count."""
        width = self.hidden_size
        operations = self.embedding.work(width, step)
        for name, count in self.counts.items():
            operations += [op.times(count) for op in self.block_work(name, step)]
        if self.norm is not None:
            operations += self.norm.work(width, step)
        return operations + self.head.work(width, step)

    def block_work(self, name: str, step: Step) -> list[Op]:
        """One sublayer's work: its norms, the block, and the sum with the stream."""
        residual = self.residual_of(name)
        norms = (
            [op.times(residual.norms) for op in residual.norm.work(self.hidden_size, step)] if residual.norms else []
        )
        join = pointwise(step, "residual sum", step.tokens * self.hidden_size, reads=2)
        return [*norms, *self.blocks[name].work(self.hidden_size, step), join]

    def live(self, step: Step) -> Live:
        """Activation memory of one call: the stream, the hungriest block, and what the backward pass keeps."""
        stream = step.tokens * self.hidden_size * step.element_bytes
        parts = [(count, self.blocks[name].live(self.hidden_size, step)) for name, count in self.counts.items()]
        head = self.head.live(self.hidden_size, step)
        peak = max([head.peak_bytes, *(part.peak_bytes for _, part in parts)])
        saved = head.saved_bytes + sum(count * (part.saved_bytes + 2 * stream) for count, part in parts)
        return Live(peak_bytes=2 * stream + peak, saved_bytes=saved * step.training)

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
        """The model from real blocks, freshly initialised (on `meta`: shapes only). Imports torch."""
        from archcompass.blocks.model.module import LanguageModel

        return LanguageModel.from_spec(self, device=device, dtype=dtype)

    def with_layers(self, layers: str) -> ModelSpec:
        """The same blocks in another pattern; blocks it does not name are left out."""
        used = {name for layer in expand(layers) for name in layer}
        update = {
            "layers": layers,
            "blocks": {name: block for name, block in self.blocks.items() if name in used},
            "residuals": {name: residual for name, residual in self.residuals.items() if name in used},
            "shared": tuple(name for name in self.shared if name in used),
        }
        return ModelSpec.model_validate(self.model_dump() | update)


def _norm(block: Block) -> Block:
    if block.traits.role != "norm":
        raise SpecError(f"{block.kind} is a {block.traits.role}; a norm is needed here, such as rms_norm or layer_norm")
    return block


def block_names(spec: ModelSpec, role: str) -> list[str]:
    """Names of the blocks that play `role` ("mixer" or "channel")."""
    return [name for name, block in spec.blocks.items() if block.traits.role == role]
