"""The memory ledger: every byte a model holds on a machine, by what it is for.

Two memories are kept apart: what the architecture needs (weights, state, activations), and what software adds to it
(the context of the device, the allocator's rounding). Several cards: what is split, and what each of them copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from archcompass.blocks.base import StateTensor, Step
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.request import Request
from archcompass.profiles.tables import efficiency_of
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
    state, state_per_card, kinds = _state(spec, request, cards)
    activations = 0.0 if request.training else _activations(spec, request, _seen(request, hardware))
    training = _training(spec, request)
    if request.training:
        state, state_per_card, kinds = 0.0, 0.0, {}
        activations = training.pop("activations")
    split = weights["matrices"] + weights["embedding and head"]
    copied = weights["kept in high precision"] if request.parallel == "tensor" else 0.0
    weights_per_card = split / cards + (copied or weights["kept in high precision"] / cards)
    training_per_card = sum(training.values()) / cards
    held = weights_per_card + state_per_card + activations + training_per_card
    context = _context(request, hardware)
    overhead = context + (0.0 if hardware.is_cpu else FRAGMENTATION * held)
    return Memory(
        weights_bytes=weights_per_card * cards,
        state_bytes=state_per_card * cards,
        activation_bytes=activations * cards,
        training_bytes=training_per_card * cards,
        overhead_bytes=overhead * cards,
        per_card_bytes=held + overhead,
        capacity_bytes=float(hardware.memory_bytes),
        detail={
            **{f"weights: {name}": size for name, size in weights.items()},
            **{f"state: {name}": size for name, size in kinds.items()},
            **{f"training: {name}": size for name, size in training.items()},
            "activations": activations * cards,
            "context of the device": context * cards,
            "allocator": (overhead - context) * cards,
        },
        notes=_notes(request, cards, weights, state, state_per_card),
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
    return {
        "matrices": request.weight_precision.bytes(parameters.matrix),
        "embedding and head": request.weight_precision.bytes(ends) if request.gguf else float(ends * high),
        "kept in high precision": float(parameters.vector * high),
    }


def _state(spec: ModelSpec, request: Request, cards: int) -> tuple[float, float, dict[str, float]]:
    """(bytes of one copy, bytes on each card, by kind) for all sequences."""
    step = request.step(1, max(request.context - 1, 0))
    whole = per_card = 0.0
    kinds: dict[str, float] = {}
    for _, count, tensors in spec.state(request.context):
        for tensor in tensors:
            size = tensor.bytes(step) * count * request.batch
            ways = cards if request.parallel == "pipeline" else shards(tensor, cards)
            whole += size
            per_card += size / ways
            kind = _kind(tensor)
            kinds[kind] = kinds.get(kind, 0.0) + size
    return whole, per_card, kinds


def _kind(tensor: StateTensor) -> str:
    if tensor.grows:
        return "grows with context"
    return "recurrent, fp32" if tensor.dtype == "fp32" else "bounded"


def _activations(spec: ModelSpec, request: Request, seen: Mapping[str, float]) -> float:
    """The most alive in any forward call: the widest chunk of the prefill, or a decode step.

    `seen` corrects what blocks state by what calibration saw of them.
    """
    steps: list[Step] = [step for _, step in request.prefill_steps()]
    last = request.step(1, max(request.context - 1, 0))
    return max(_peak(spec, step, seen) for step in [*steps[:1], last])


def _seen(request: Request, hardware: Hardware) -> Mapping[str, float]:
    """What calibration saw of our own blocks on this machine; engines have their own kernels."""
    return efficiency_of(hardware).live if request.engine == "native" else {}


def _peak(spec: ModelSpec, step: Step, seen: Mapping[str, float]) -> float:
    """Two residual streams and the hungriest sublayer, or the head."""
    width = spec.hidden_size
    stream = 2.0 * step.tokens * width * step.element_bytes
    kinds = [(block.kind, block.live(width, step).peak_bytes) for block in spec.blocks.values()]
    parts = [(stream + peak) * seen.get(f"{kind}:{step.activations}", 1.0) for kind, peak in kinds]
    return max([*parts, stream + spec.head.live(width, step).peak_bytes])


def _training(spec: ModelSpec, request: Request) -> dict[str, float]:
    """Gradients, optimizer states and saved activations of a training step."""
    if not request.training:
        return {}
    total = spec.parameters().total
    element = 4 if request.precision == "fp32" else 2
    live = spec.live(request.step(request.prompt))
    stream = request.batch * request.prompt * spec.hidden_size * (4 if request.activations == "fp32" else 2)
    depth = sum(spec.counts.values())
    kept = {
        "none": live.saved_bytes,
        "selective": min(live.saved_bytes, 2.0 * stream * depth + 0.5 * live.saved_bytes),
        "full": min(live.saved_bytes, float(stream * depth) + live.saved_bytes / max(spec.num_hidden_layers, 1)),
    }[request.recompute]
    return {
        "gradients": float(total * element),
        "optimizer": total * OPTIMIZER_BYTES[request.optimizer],
        "master weights": float(total * 4) if request.master_weights else 0.0,
        "activations": kept + live.peak_bytes,
    }


def _context(request: Request, hardware: Hardware) -> float:
    return CPU_CONTEXT_BYTES if hardware.is_cpu else CONTEXT_BYTES[request.engine]


def _notes(
    request: Request, cards: int, weights: Mapping[str, float], state: float, state_per_card: float
) -> tuple[str, ...]:
    notes = []
    high = weights["embedding and head"] + weights["kept in high precision"]
    if request.gguf:
        notes.append("a GGUF file quantises embedding and head too; norms, biases and routers stay in 16 bits")
    elif request.weight_precision.bits < 16:
        notes.append(f"{high / GB:.2f} GB stay in 16 bits: embedding, head, norms, biases, routers")
    if cards > 1 and state_per_card * cards > 1.01 * state:
        notes.append(f"{(state_per_card * cards - state) / GB:.2f} GB of state are copies: fewer heads than cards")
    return tuple(notes)
