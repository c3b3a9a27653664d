"""The memory ledger: every byte a model holds on a machine, by what it is for.

Two memories are kept apart: what the architecture needs (weights, state, activations), and what software adds to it
(the context of the device, the allocator's rounding). Several cards: what is split, and what each of them copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from archcompass.blocks.base import StateTensor, Step
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.activations import forward_peak, on_one_card, training_worst
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.request import Request
from archcompass.profiles.units import GB, GIB

# Bytes a process holds before the first weight: the device context with its libraries (0.3 to 0.7 GiB on NVIDIA cards,
# read from nvidia-smi), for a processor Python with torch loaded. Serving engines add pools and captured graphs
# (vLLM and llama.cpp: 1 to 2 GiB and 0.3 to 1.8 GiB).
CONTEXT_BYTES = {"native": 0.5 * GIB, "transformers": 0.6 * GIB, "vllm": 1.8 * GIB, "llama.cpp": 0.6 * GIB}
CPU_CONTEXT_BYTES = 0.35 * GIB

# What torch's caching allocator holds beyond what is asked for: 2 MiB segments and blocks that fit nobody.
FRAGMENTATION = 0.02

# Bytes of optimizer state per weight.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256, "sgd": 4.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of one request, over all cards.

    Attributes:
        weights_bytes: stored weights, copies on several cards included.
        state_bytes: caches and recurrent state of all sequences at the end of the request.
        activation_bytes: the most that one forward call (or training step) has alive beside weights and state.
        training_bytes: gradients and optimizer states; 0 for inference.
        system_bytes: experts that lie in the machine's own memory, and in none of the sums over cards.
        overhead_bytes: the device's context and what the allocator holds in vain.
        per_card_bytes: on the fullest card.
        capacity_bytes: what a process can use of one card.
        detail: the same bytes, finer, by name.
        notes: what a reader must know about the sums.
    """

    weights_bytes: float
    state_bytes: float
    activation_bytes: float
    overhead_bytes: float
    training_bytes: float = 0.0
    system_bytes: float = 0.0
    per_card_bytes: float
    capacity_bytes: float
    detail: Mapping[str, float] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> float:
        """Everything, over all cards."""
        return self.weights_bytes + self.state_bytes + self.activation_bytes + self.training_bytes + self.overhead_bytes

    @property
    def margin_bytes(self) -> float:
        """What the fullest card has left; negative when it does not fit."""
        return self.capacity_bytes - self.per_card_bytes

    @property
    def fits(self) -> bool:
        """Whether every card holds its part."""
        return self.per_card_bytes <= self.capacity_bytes


def memory(spec: ModelSpec, request: Request, hardware: Hardware) -> Memory:
    """The ledger of `request`. Bytes are those at the end of it, when the state is longest."""
    cards = hardware.count
    weights = _weights(spec, request)
    own = request.on_each(cards)
    state, state_per_card, kinds = _state(spec, request, cards)
    activations = 0.0 if request.training else _activations(spec, own, hardware)
    training = _training(spec, own, hardware)
    if request.training:
        state, state_per_card, kinds = 0.0, 0.0, {}
        activations = training.pop("activations")
    system = request.offload * _routed(spec, request) if request.offload else 0.0
    weights_per_card = _weights_on_a_card(spec, request, weights, cards)
    training_per_card = sum(training.values()) / cards
    held = weights_per_card + state_per_card + activations + training_per_card
    context, room = _context(request, hardware), _room(spec, own)
    overhead = context + room + (0.0 if hardware.is_cpu else FRAGMENTATION * held)
    return Memory(
        weights_bytes=weights_per_card * cards,
        state_bytes=state_per_card * cards,
        activation_bytes=activations * cards,
        training_bytes=training_per_card * cards,
        system_bytes=system,
        overhead_bytes=overhead * cards,
        per_card_bytes=held + overhead,
        capacity_bytes=float(hardware.memory_bytes),
        detail={
            **{f"weights: {name}": size for name, size in weights.items()},
            **{f"state: {name}": size for name, size in kinds.items()},
            **{f"training: {name}": size for name, size in training.items()},
            "activations": activations * cards,
            "context of the device": context * cards,
            "room for windows to move in": room * cards,
            "allocator": (overhead - context - room) * cards,
        },
        notes=(
            *_asked(spec, request, cards),
            *_notes(request, cards, weights, plain_matrices(spec, request), state, state_per_card),
        ),
    )


def shards(tensor: StateTensor, cards: int) -> int:
    """Over how many cards a state divides: by heads. Layouts are [tokens, heads, dim] for caches (a latent without heads
    is copied to every card) and [heads or channels, ...] for recurrent state."""
    if not tensor.grows and tensor.dtype != "cache":
        return cards
    return min(cards, tensor.shape[1]) if len(tensor.shape) > 2 else 1


def _weights(spec: ModelSpec, request: Request) -> dict[str, float]:
    """Bytes of one copy. GGUF files quantise the two ends too; other formats leave them in high precision."""
    parameters = spec.parameters()
    high = 4 if request.precision == "fp32" else 2
    ends = parameters.table + parameters.head
    plain = plain_matrices(spec, request)
    return {
        "matrices": request.weight_precision.bytes(parameters.matrix - plain) + float(plain * high),
        "embedding and head": request.weight_precision.bytes(ends) if request.gguf else float(ends * high),
        "kept in high precision": float(parameters.vector * high),
    }


def plain_matrices(spec: ModelSpec, request: Request) -> int:
    """Elements of matrices that stay in 16 bits, though the format is smaller: all but the experts (`experts_alone`)."""
    parameters = spec.parameters()
    if not request.weight_precision.experts_alone or not parameters.routed:
        return 0
    return parameters.matrix - parameters.routed


def _routed(spec: ModelSpec, request: Request) -> float:
    """Bytes of the routed experts."""
    return request.weight_precision.bytes(spec.parameters().routed)


def _weights_on_a_card(spec: ModelSpec, request: Request, weights: Mapping[str, float], cards: int) -> float:
    """Bytes of weights on each card: what is split, what every card copies, and nothing of what lies in system memory."""
    whole = sum(weights.values())
    if request.parallel == "tensor" and not request.offload:
        copied = weights["kept in high precision"] if cards > 1 else 0.0
        return copied + (whole - copied) / cards
    routed, copied = _routed(spec, request), 0.0
    if request.parallel == "tensor":
        copied = weights["kept in high precision"]
    elif request.parallel == "data" and not request.training:
        copied = whole - routed
    return copied + (whole - copied - request.offload * routed) / cards


def _state(spec: ModelSpec, request: Request, cards: int) -> tuple[float, float, dict[str, float]]:
    """(bytes of one copy, bytes on each card, by kind) for all sequences."""
    step = request.step(1, max(request.context - 1, 0))
    whole = per_card = 0.0
    kinds: dict[str, float] = {}
    for _, count, tensors in spec.state(request.context):
        for tensor in tensors:
            each = tensor.bytes(step) * count
            size = each * request.batch
            whole += size
            per_card += _part(each, tensor, request, cards)
            kind = _kind(tensor)
            kinds[kind] = kinds.get(kind, 0.0) + size
    return whole, per_card, kinds


def _room(spec: ModelSpec, request: Request) -> float:
    """Bytes that our own modules hold beyond the state itself (`StateTensor.held`), no more than is generated."""
    if request.training or request.engine != "native":
        return 0.0
    step = request.step(1, max(request.context - 1, 0))
    spare = (
        min(tensor.held - 1, request.generate / tensor.shape[0]) * tensor.bytes(step) * count
        for _, count, tensors in spec.state(request.context)
        for tensor in tensors
        if tensor.held > 1
    )
    return request.batch * sum(spare)


def _part(each: float, tensor: StateTensor, request: Request, cards: int) -> float:
    """Bytes on the fullest card of a state that takes `each` bytes for one sequence."""
    if request.parallel == "data":
        return each * request.on_each(cards).batch
    return each * request.batch / (cards if request.parallel == "pipeline" else shards(tensor, cards))


def _kind(tensor: StateTensor) -> str:
    if tensor.grows:
        return "grows with context"
    return "recurrent, fp32" if tensor.dtype == "fp32" else "bounded"


def _activations(spec: ModelSpec, request: Request, hardware: Hardware) -> float:
    """The most alive in any forward call: the widest chunk of the prefill, or a decode step."""
    steps: list[Step] = [step for _, step in request.prefill_steps()]
    last = request.step(1, max(request.context - 1, 0))
    part = on_one_card(spec, request, hardware.count)
    return max(forward_peak(part, replace(step, fused=not hardware.is_cpu)) for step in [*steps[:1], last])


def _training(spec: ModelSpec, request: Request, hardware: Hardware) -> dict[str, float]:
    """Gradients and activations at the worst moment of a training step, and optimizer states."""
    if not request.training:
        return {}
    total = spec.parameters().total
    worst = training_worst(
        spec, request, replace(request.step(request.prompt), fused=not hardware.is_cpu), hardware.count
    )
    return {
        "gradients": worst.gradients * hardware.count,
        "optimizer": total * OPTIMIZER_BYTES[request.optimizer],
        "master weights": float(total * 4) if request.master_weights else 0.0,
        "activations": worst.activations,
    }


def _context(request: Request, hardware: Hardware) -> float:
    return CPU_CONTEXT_BYTES if hardware.is_cpu else CONTEXT_BYTES[request.engine]


_SHARED = {
    "tensor": "every card computes a part of every product (tensor parallel)",
    "data": "every card has sequences of its own; experts are shared out (data parallel)",
    "pipeline": "every card has some of the layers (pipeline)",
}


def _asked(spec: ModelSpec, request: Request, cards: int) -> list[str]:
    """What the question was taken to mean, and where it asks too much of the model."""
    notes = []
    if cards > 1:
        sharded = request.training and request.parallel == "data"
        own = "every card has sequences of its own and a part of the weights (fully sharded)"
        notes.append(own if sharded else _SHARED[request.parallel])
    if request.mode == "finetuning":
        notes.append(
            "all weights are trained; adapters beside frozen weights (QLoRA, as recommend means it) hold far less"
        )
    most = spec.max_position_embeddings
    if most is not None and request.prompt > most:
        notes.append(f"{request.prompt:,} tokens are more than the {most:,} that the model was made for")
    return notes


def _notes(
    request: Request, cards: int, weights: Mapping[str, float], plain: int, state: float, state_per_card: float
) -> tuple[str, ...]:
    notes = []
    if request.offload:
        notes.append(f"{request.offload:.0%} of the experts lie in system memory")
    high = weights["embedding and head"] + weights["kept in high precision"] + 2.0 * plain
    if request.gguf:
        notes.append("a GGUF file quantises embedding and head too; norms, biases and routers stay in 16 bits")
    elif request.weight_precision.bits < 16:
        what = "all but the experts" if plain else "embedding, head, norms, biases, routers"
        notes.append(f"{high / GB:.2f} GB stay in 16 bits: {what}")
    if request.parallel == "tensor" and cards > 1 and state_per_card * cards > 1.01 * state:
        notes.append(f"{(state_per_card * cards - state) / GB:.2f} GB of state are copies: fewer heads than cards")
    return tuple(notes)
