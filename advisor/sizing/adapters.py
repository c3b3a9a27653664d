"""What training costs: adapters on frozen weights (fine-tuning), and the tokens and days of training from nothing.

Fine-tuning is taken as QLoRA (Dettmers et al., arXiv 2305.14314): weights frozen in their format, low-rank adapters beside
every matrix in 16 bits, activations computed again in the backward pass. Measured for 7-8B models: 6 to 14 GB, at 2 x 2048
tokens 7.4 GB with a chunked loss (torchtune); this ledger says 11 GB there.
"""

from __future__ import annotations

from dataclasses import replace

from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.shapes import dense_equivalent
from archcompass.blocks.base import Step
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.ledger import Memory, memory
from archcompass.profiles.request import Request

ADAPTER_SHARE = 0.01
"""Adapter weights over frozen ones: rank 16 to 64 on all matrices."""

ADAPTER_BYTES = 2 + 2 + 8
"""Each adapter weight, its gradient, and Adam's two moments."""

FINETUNING_TOKENS = 4e7
"""20,000 examples of 2,000 tokens: what one fine-tuning is assumed to read."""

FINETUNING_DAYS, TRAINING_DAYS = 1.0, 60.0
"""Longest that each may take when no time was given."""

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal training (Hoffmann et al., arXiv 2203.15556); models made to be used read 10 to 100 times as many."""

TRAINING_MFU = {"dense": 0.40, "experts": 0.18}
"""Share of the arithmetic peak: dense bf16 on H100 0.40 to 0.46, experts 0.13 to 0.22 (Megatron-Bridge)."""


def adapter_memory(spec: ModelSpec, request: Request, hardware: Hardware) -> Memory:
    """The ledger of fine-tuning by adapters: `request.batch` sequences of `request.prompt` tokens in a step.

    Several cards share the weights and the sequences (fully sharded data parallel).
    """
    frozen = memory(spec, replace(request, generate=0, prompt=1, batch=1, mode="inference"), hardware)
    adapters = ADAPTER_SHARE * spec.parameters().matrix * ADAPTER_BYTES
    activations = _recomputed(spec, request)
    cards = hardware.count
    per_card = (frozen.weights_bytes + adapters + activations) / cards
    overhead = frozen.detail["context of the device"] / cards + 0.02 * per_card
    return Memory(
        weights_bytes=frozen.weights_bytes,
        state_bytes=0.0,
        activation_bytes=activations,
        training_bytes=adapters,
        overhead_bytes=overhead * cards,
        per_card_bytes=per_card + overhead,
        capacity_bytes=float(hardware.memory_bytes),
        detail={"frozen weights": frozen.weights_bytes, "adapters": adapters, "activations": activations},
        notes=("weights are frozen; adapters of 1 % are trained beside them (QLoRA)",),
    )


def _recomputed(spec: ModelSpec, request: Request) -> float:
    """Activations with full recomputation: the stream at every layer, one layer's own, and what is alive at once."""
    step = Step(batch=request.batch, new_tokens=request.prompt, training=True)
    live = spec.live(step)
    stream = step.tokens * spec.hidden_size * step.element_bytes
    depth = sum(spec.counts.values())
    return min(live.saved_bytes, stream * depth + live.saved_bytes / max(spec.num_hidden_layers, 1)) + live.peak_bytes


def training_tokens(spec: ModelSpec, ask: Ask) -> float:
    """Tokens that the training is assumed to read."""
    if ask.reading.workload.mode == "finetuning":
        return FINETUNING_TOKENS
    return TOKENS_PER_PARAMETER * dense_equivalent(spec)


def training_days(spec: ModelSpec, ask: Ask) -> float:
    """Days for those tokens: six FLOPs a token and active parameter (eight with recomputation), at the usual MFU."""
    sparse = any(traits.sparse_activation for traits in spec.traits().values())
    rate = ask.hardware.rate("bf16") * ask.hardware.count * TRAINING_MFU["experts" if sparse else "dense"]
    return 8.0 * spec.parameters().active * training_tokens(spec, ask) / rate / 86_400.0


def days_allowed(ask: Ask) -> float:
    """Longest that the training may take."""
    return FINETUNING_DAYS if ask.reading.workload.mode == "finetuning" else TRAINING_DAYS
