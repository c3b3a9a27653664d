"""The model at work: `forward(input_ids, state=None)` serves prompts, further segments and single steps alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from archcompass.blocks.embedding.module import EmbeddingModule, HeadModule
from archcompass.blocks.layout import lay_by_columns
from archcompass.blocks.model.spec import ModelSpec, Residual
from archcompass.blocks.runtime import BlockModule, BlockState, Context, initialise
from archcompass.errors import InputError
from archcompass.kernels.cross_entropy import linear_cross_entropy


@dataclass(slots=True)
class ModelState:
    """Everything that lives between calls. A forward call updates it in place and returns it; `copy` to keep a branch.

    Attributes:
        blocks: the state of each sublayer, in order; None where there is none.
        past: tokens seen per sequence, padding included.
        padding: [batch] padding tokens at the left of each sequence, or None.
    """

    blocks: list[BlockState | None] = field(default_factory=list)
    past: int = 0
    padding: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, for the whole batch."""
        return sum(state.nbytes for state in self.blocks if state is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that hold it: `nbytes`, and the room that caches keep for tokens to come."""
        return sum(state.held_bytes for state in self.blocks if state is not None)

    def copy(self) -> ModelState:
        """An independent state with the same content."""
        return ModelState([state and state.copy() for state in self.blocks], self.past, self.padding)


class Output(NamedTuple):
    """What a forward call says.

    Attributes:
        logits: [batch, kept, vocab], or None when only the loss was asked for.
        state: to be handed to the next call, or None in training.
        loss: mean cross entropy against `labels` plus auxiliary losses, or None without labels.
    """

    logits: Tensor | None
    state: ModelState | None
    loss: Tensor | None = None


class Sublayer(nn.Module):
    """h -> skip · h + multiplier · post_norm(block(pre_norm(h)))."""

    def __init__(self, residual: Residual, block: BlockModule, width: int) -> None:
        super().__init__()
        self.block = block
        self.before = residual.norm.build(width) if residual.position in ("pre", "sandwich") else None
        self.after = residual.norm.build(width) if residual.position in ("post", "sandwich") else None
        self.multiplier, self.skip_multiplier = residual.multiplier, residual.skip_multiplier
        self.skip_is_normed = residual.skip == "normed"

    def forward(self, h: Tensor, state: BlockState | None, context: Context) -> tuple[Tensor, BlockState | None]:
        x = h if self.before is None else self.before(h)[0]
        y, state = self.block(x, state, context)
        y = y if self.after is None else self.after(y)[0]
        y = y if self.multiplier == 1.0 else y * self.multiplier
        skip = x if self.skip_is_normed else h
        return (skip if self.skip_multiplier == 1.0 else skip * self.skip_multiplier) + y, state


class LanguageModel(nn.Module):
    """A `ModelSpec` at work.

    Attributes:
        spec: the description it was built from.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.hidden_size
        self.embedding = EmbeddingModule(spec.embedding, width)
        self.layers = nn.ModuleList(self._sublayers())
        self.norm = spec.norm.build(width) if spec.norm is not None else None
        self.head = HeadModule(spec.head, width)

    def _sublayers(self) -> list[Sublayer]:
        spec, width = self.spec, self.spec.hidden_size
        firsts: dict[str, BlockModule] = {}

        def block(name: str, depth: int) -> BlockModule:
            if name in spec.shared and name in firsts:
                return firsts[name].twin(depth)
            firsts[name] = spec.blocks[name].build(width, depth)
            return firsts[name]

        places = [(name, depth) for depth, layer in enumerate(spec.expanded) for name in layer]
        return [Sublayer(spec.residual_of(name), block(name, depth), width) for name, depth in places]

    @classmethod
    def from_spec(
        cls, spec: ModelSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """Builds on `device` in `dtype` (None: torch's default) and fills the weights with the start of a training run."""
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype or before)
            with torch.device(device):
                model = cls(spec)
        finally:
            torch.set_default_dtype(before)
        if torch.device(device).type != "meta":
            initialise(model)
        return model.eval()

    def for_decoding(self) -> LanguageModel:
        """Lays the matrices by columns, in large pages, in place: a single token takes 0.5 to 0.8 of the time on a CPU.

        Names, shapes and values stay; only strides change. Batches of a few tokens may take longer. A table
        that is only looked up stays as it is.
        """
        lay_by_columns(self, besides=[] if self.head.weight is None else [self.embedding.weight])
        return self

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        logits_to_keep: int = 0,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        room: int = 0,
    ) -> Output:
        """One call.

        Args:
            input_ids: [batch, time] tokens.
            state: what the previous call returned, or None at the start.
            logits_to_keep: only the last so many positions; 0 keeps all.
            attention_mask: [batch, time] 0 where a token is left padding; only at the start.
            labels: [batch, time] targets, already shifted; -100 is ignored. Gives `loss` and no logits.
            room: tokens that will follow, when known at the first call: caches then take no more than they need.

        Raises:
            InputError: a mask with a hole or padding at the right, or one given again with a state.
        """
        if state is not None and attention_mask is not None:
            raise InputError("attention_mask is given at the start only; the state remembers it")
        state = state or ModelState(blocks=[None] * len(self.layers), padding=_padding(attention_mask))
        context = Context(past=state.past, padding=state.padding, keep_state=not self.training, room=room)
        h, _ = self.embedding(input_ids, None, context)
        context.embeddings = h
        for index, layer in enumerate(self.layers):
            h, state.blocks[index] = layer(h, state.blocks[index], context)
        state.past += input_ids.shape[1]
        h = h if labels is not None else h[:, -logits_to_keep:]
        h = h if self.norm is None else self.norm(h)[0]
        kept = None if self.training else state
        if labels is not None:
            return Output(None, kept, self._loss(h, labels, context))
        return Output(self.head.logits(h, self.embedding.weight), kept)

    def _loss(self, h: Tensor, labels: Tensor, context: Context) -> Tensor:
        weight = self.embedding.weight if self.head.weight is None else self.head.weight
        loss = linear_cross_entropy(
            h.flatten(0, 1),
            weight,
            labels.flatten(),
            scale=self.spec.logit_multiplier,
            soft_cap=self.spec.logit_soft_cap,
        )
        return loss + sum((torch.stack(parts).sum() for parts in context.losses.values()), start=loss.new_zeros(()))

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy continuation: [batch, time] -> [batch, new_tokens]. A model in training is evaluated meanwhile."""
        training = self.training
        self.eval()
        try:
            tokens, state = [input_ids], None
            for _ in range(new_tokens):
                out = self(tokens[-1], state, logits_to_keep=1, room=new_tokens)
                tokens.append(out.logits.argmax(-1))
                state = out.state
            return torch.cat([input_ids[:, :0], *tokens[1:]], dim=1)
        finally:
            self.train(training)


def _padding(attention_mask: Tensor | None) -> Tensor | None:
    """[batch] how many tokens at the left of each row are padding; None when no row has any.

    Raises:
        InputError: something else than padding at the left.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("attention_mask has a 0 after a 1; padding stands at the left of each row, before its tokens")
    return attention_mask.shape[1] - mask.sum(dim=1)
