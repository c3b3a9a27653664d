"""What block modules share: the context of a forward call, and the state that lives between calls.

Layout everywhere: activations [batch, time, width], heads [batch, time, heads, dim], recurrent state in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archcompass.kernels.linear import linear, linears

if TYPE_CHECKING:
    from archcompass.blocks.base import Block


@dataclass(slots=True)
class Context:
    """What a block may know about the forward call it takes part in.

    Attributes:
        past: tokens per sequence that the state already holds (padding included).
        padding: [batch] number of padding tokens at the left of each sequence, or None when there are none.
        keep_state: whether a state is wanted; training needs none.
        embeddings: [batch, time, width] the model's embeddings, for blocks that look at them again.
        shared: values that one layer leaves for the ones above it, by name.
        losses: auxiliary losses that blocks add in training, by name; each already carries its coefficient.
        tables: tensors computed once per call and used by many layers (rotary tables), by key.
        room: tokens per sequence that will follow this call, where that is known; caches are made to hold them.
    """

    past: int = 0
    padding: Tensor | None = None
    keep_state: bool = True
    embeddings: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    tables: dict[object, tuple[Tensor, ...]] = field(default_factory=dict)
    room: int = 0

    def positions(self, time: int, device: torch.device) -> Tensor:
        """[batch or 1, time] position of each new token, counted from the first real token of its sequence."""
        steps = torch.arange(self.past, self.past + time, device=device)
        if self.padding is None:
            return steps[None]
        return (steps[None] - self.padding[:, None]).clamp(min=0)

    def real(self, time: int, device: torch.device) -> Tensor | None:
        """[batch, time, 1] True where a new token is no padding; None when none can be."""
        if self.padding is None:
            return None
        steps = torch.arange(self.past, self.past + time, device=device)
        return (steps[None] >= self.padding[:, None])[..., None]


class BlockState:
    """What one block keeps between calls. A forward call updates it in place and returns it; `copy` to keep a branch."""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name, without spare capacity. Names and shapes are those of the spec's `state`."""
        raise TypeError(f"{type(self).__name__} does not list its tensors")

    def copy(self) -> BlockState:
        """An independent state with the same content."""
        raise TypeError(f"{type(self).__name__} cannot be copied")

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, for the whole batch."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that hold it, room to spare included."""
        return self.nbytes


@dataclass(slots=True)
class FixedState(BlockState):
    """Tensors of constant size. A subclass is a slotted dataclass whose fields are all tensors."""

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def copy(self) -> FixedState:
        return type(self)(**{name: tensor.clone() for name, tensor in self.tensors().items()})


class CompoundState(BlockState):
    """The states of a block's parts, by name; their tensors are called "part.tensor"."""

    def __init__(self, parts: dict[str, BlockState | None]) -> None:
        self.parts = parts

    def tensors(self) -> dict[str, Tensor]:
        kept = ((part, state.tensors()) for part, state in self.parts.items() if state is not None)
        return {f"{part}.{name}": tensor for part, tensors in kept for name, tensor in tensors.items()}

    @property
    def held_bytes(self) -> int:
        return sum(state.held_bytes for state in self.parts.values() if state is not None)

    def copy(self) -> CompoundState:
        return CompoundState({part: state and state.copy() for part, state in self.parts.items()})


def row_by_row(
    forward: Callable[[Tensor, BlockState | None, Context], tuple[Tensor, BlockState | None]],
    x: Tensor,
    state: BlockState | None,
    context: Context,
) -> tuple[Tensor, BlockState | None]:
    """A padded batch as single sequences without padding, for blocks whose pattern counts from the first real token.

    Outputs at padding are zero. The state is that of every row, called "row0", "row1" and so on.
    """
    assert context.padding is not None
    outputs, states = [], {}
    for row, left in enumerate(context.padding.tolist()):
        skipped = min(max(left - context.past, 0), x.shape[1])
        part, name = x[row : row + 1, skipped:], f"row{row}"
        y, states[name] = part, part_of(state, name)
        if part.shape[1]:
            look_back = None if context.embeddings is None else context.embeddings[row : row + 1, skipped:]
            alone = Context(max(context.past - left, 0), keep_state=context.keep_state, embeddings=look_back)
            y, states[name] = forward(part, states[name], alone)
        outputs.append(nn.functional.pad(y, (0, 0, skipped, 0)))
    return torch.cat(outputs), CompoundState(states) if context.keep_state else None


def part_of(state: BlockState | None, part: str) -> BlockState | None:
    """The state of one part of a block, or None when there is none yet."""
    return state.parts.get(part) if isinstance(state, CompoundState) else None


class GrowingState(BlockState):
    """Tensors [batch, tokens, ...] that grow with the context, with room to spare so that a step copies nothing.

    Args:
        keep: the most tokens that stay; older ones are dropped. None keeps all. A window is held twice over, so that it moves
            once in a window's length and not at every step.
        room: tokens that will follow the first call, which then get exactly their place.

    Attributes:
        first_position: absolute position of the first token of what `append` last returned.
    """

    def __init__(self, keep: int | None = None, room: int = 0) -> None:
        self.keep = keep
        self.room = room
        self.first_position = 0
        self._dropped = 0
        self._buffers: dict[str, Tensor] = {}
        self._start = 0
        self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    def append(self, **new: Tensor) -> dict[str, Tensor]:
        """Adds [batch, time, ...] tensors; returns all that is kept and all that is new, and notes its `first_position`.

        With `keep`, older tokens are dropped only after this call's queries have had their look at them.
        """
        time = next(iter(new.values())).shape[1]
        self._trim()
        self.first_position = self._dropped
        if self.keep is not None and time > self.keep:
            return self._replace(new, time)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new.values()):
            return self._join(new)
        if not self._buffers:
            self._allocate(new, time)
        elif self._end + time > next(iter(self._buffers.values())).shape[1]:
            self._grow(time)
        for name, tensor in new.items():
            self._buffers[name][:, self._end : self._end + time] = tensor
        self._end += time
        return {name: buffer[:, self._start : self._end] for name, buffer in self._buffers.items()}

    def tensors(self) -> dict[str, Tensor]:
        self._trim()
        return {name: buffer[:, self._start : self._end] for name, buffer in self._buffers.items()}

    @property
    def held_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self) -> GrowingState:
        twin = GrowingState(self.keep, self.room)
        twin.first_position, twin._dropped = self.first_position, self._dropped
        twin._start, twin._end = self._start, self._end
        twin._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return twin

    def _trim(self) -> None:
        if self.keep is not None and len(self) > self.keep:
            surplus = len(self) - self.keep
            self._start += surplus
            self._dropped += surplus

    def _replace(self, new: dict[str, Tensor], time: int) -> dict[str, Tensor]:
        """A segment longer than what is kept: seen whole now, stored by its tail only."""
        kept = len(self)
        whole = {name: torch.cat([*self._kept(name), tensor], dim=1) for name, tensor in new.items()} if kept else new
        self._buffers, self._start, self._end = {}, 0, 0
        tails = {name: tensor[:, -self.keep :] for name, tensor in new.items()} if self.keep else {}
        self._dropped += kept + time - (self.keep or 0)
        if tails:
            self._allocate(tails, self.keep or 0)
            for name, tail in tails.items():
                self._buffers[name][:, : self.keep] = tail
            self._end = self.keep or 0
        return whole

    def _join(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without writing in place, so that the gradient of an earlier call stays whole."""
        self._buffers = {name: torch.cat([*self._kept(name), tensor], dim=1) for name, tensor in new.items()}
        self._start, self._end = 0, next(iter(self._buffers.values())).shape[1]
        return dict(self._buffers)

    def _kept(self, name: str) -> list[Tensor]:
        return [self._buffers[name][:, self._start : self._end]] if self._buffers else []

    def _allocate(self, new: dict[str, Tensor], time: int) -> None:
        capacity = time + self.room if self.room else _capacity(time)
        if self.keep is not None:
            capacity = max(time, min(2 * self.keep, capacity) if self.room else 2 * self.keep)
        for name, tensor in new.items():
            self._buffers[name] = _buffer(tensor, capacity)

    def _grow(self, time: int) -> None:
        """Moves what is kept to the front, into larger buffers when it would not fit: amortised, one copy a token."""
        kept = len(self)
        for name, buffer in self._buffers.items():
            capacity = buffer.shape[1]
            roomy = self.keep is not None and kept + time <= capacity and kept <= self._start
            target = buffer if roomy else _buffer(buffer, _capacity(kept + time))
            target[:, :kept] = buffer[:, self._start : self._end]
            self._buffers[name] = target
        self._start, self._end = 0, kept


def _buffer(like: Tensor, tokens: int) -> Tensor:
    """[batch, tokens, ...] without content; tokens of one head lie together, which is how attention reads them."""
    batch, _, *rest = like.shape
    if len(rest) < 2:
        return like.new_empty(batch, tokens, *rest)
    return like.new_empty(batch, rest[0], tokens, *rest[1:]).transpose(1, 2)


def _capacity(tokens: int) -> int:
    """Room for half as many tokens again, in steps of 64."""
    return -(-(tokens + tokens // 2) // 64) * 64


class BlockModule(nn.Module):
    """A block at work: `forward(x, state) -> (y, state)` serves whole prompts, further segments and single steps.

    Attributes:
        spec: the description it was built from.
        width: channels it acts on.
    """

    def __init__(self, spec: Block, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.width = width

    def reset_parameters(self) -> None:
        """Fills this module's own parameters with the start of a training run; its children's are filled already."""

    def after_step(self) -> None:
        """What a block does by itself after each training step, once the optimizer has moved its weights."""

    def read_together(self) -> Sequence[Sequence[Linear]]:
        """Layers without bias, of inputs of one width, that `at_once` runs; for decoding they are laid one behind the other."""
        return ()

    def twin(self, layer: int) -> BlockModule:
        """This block at one more place of a model that shares its weights; `layer` is the depth there.

        The module itself, unless a block has something at every place (`Block.own_parameters`).
        """
        return self

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        """x [batch, time, width] and the state after the earlier tokens -> y [batch, time, width] and the state after these."""
        raise TypeError(f"{type(self).__name__} has no forward")


class Linear(nn.Linear):
    """torch's linear layer, drawn from N(0, 0.02²) at the start (GPT-2), left empty until `reset_parameters`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def at_once(layers: Sequence[Linear], inputs: Tensor) -> Sequence[Tensor]:
    """Every layer of its own input [layers, ..., width]: one call for a single token and matrices laid together.

    A module of another type in a layer's place (an adapter's, say) is called, so that nothing of it is lost.
    """
    known = all(type(layer) is Linear for layer in layers)
    products = linears(inputs, [layer.weight for layer in layers]) if known else None
    return [layer(x) for layer, x in zip(layers, inputs, strict=True)] if products is None else products


def initialise(module: nn.Module) -> None:
    """Fills every parameter with the start of a training run, children before their parents."""
    for child in reversed(list(module.modules())):
        if isinstance(child, BlockModule | Linear):
            child.reset_parameters()
