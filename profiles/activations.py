"""Activation memory of a whole model: the most alive in a forward call, and in a step of training.

A forward call holds the embeddings, the stream, its norm and what the hungriest block has alive. A training step is walked as
autograd does it: what each sublayer saves grows through the forward pass; backward it falls while gradients of weights grow;
last the optimizer looks at all gradients. The worst moment counts, with what is alive at that moment and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

from archcompass.blocks.base import Live, Step
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.request import Request


class Worst(NamedTuple):
    """The worst moment of a training step: bytes of gradients of weights, and of activations, alive then."""

    gradients: float
    activations: float


def on_one_card(spec: ModelSpec, request: Request, cards: int) -> ModelSpec:
    """The model as each of `cards` computes it. The stream, its norms and the logits are on every card."""
    if cards == 1 or request.parallel != "tensor":
        return spec
    return spec.model_copy(update={"blocks": {name: block.share(cards) for name, block in spec.blocks.items()}})


def forward_peak(spec: ModelSpec, step: Step) -> float:
    """Bytes alive at once in a forward call, beside weights and state, logits included."""
    stream = _stream(spec, step)
    inside = max(sublayer_live(spec, name, step).peak_bytes for name in spec.blocks)
    # At the last norm the embeddings, the stream and the kept positions are alive.
    last = spec.head.rows(step) * spec.hidden_size * step.element_bytes
    head = 2 * stream + 2 * last + spec.head.live(spec.hidden_size, step).peak_bytes
    return max(2 * stream + inside, head)


def sublayer_live(spec: ModelSpec, name: str, step: Step) -> Live:
    """A sublayer, norms and residual sum included, without the stream that enters it."""
    width, residual = spec.hidden_size, spec.residual_of(name)
    block, stream = spec.blocks[name].live(width, step), _stream(spec, step)
    norm = residual.norm.live(width, step) if residual.norms else Live()
    entering = stream if residual.position in ("pre", "sandwich") else 0.0
    peak = max(entering + block.peak_bytes, norm.peak_bytes, entering + 2 * stream)
    saved = block.saved_bytes + (norm.saved_bytes * residual.norms + stream) * step.training
    return Live(peak_bytes=peak, saved_bytes=saved, backward_bytes=max(block.backward_bytes, norm.backward_bytes))


def training_worst(spec: ModelSpec, request: Request, step: Step, cards: int = 1) -> Worst:
    """The worst moment of one step of `request` on each of `cards` that share gradients and their updates.

    Gradients are released once the optimizer has used them, so that there are none in the next forward pass.
    """
    element = (4.0 if request.precision == "fp32" else 2.0) / cards
    counts, stream = spec.parameters(), _stream(spec, step)
    part = on_one_card(spec, request, cards)
    parts = {name: _kept(part, name, request, step) for name in spec.blocks}
    weights = {name: element * block.parameters(spec.hidden_size).total for name, block in spec.blocks.items()}
    order = [name for layer in spec.expanded for name in layer]
    saved = sum(parts[name].saved_bytes for name in order)  # the embeddings too: they are what the first norm keeps
    final = spec.norm.live(spec.hidden_size, step).saved_bytes if spec.norm is not None else 0.0
    # No gradient of the stream is alive yet but those that the head counts itself.
    moments = [Worst(0.0, saved + final + spec.head.live(spec.hidden_size, step).peak_bytes)]
    gradients = element * (counts.head or counts.table)
    left = dict.fromkeys(spec.shared, 1)
    for name in reversed(order):
        # The gradient of what leaves the sublayer stays for the sum with the stream.
        moments.append(Worst(gradients + weights[name], saved + stream + parts[name].backward_bytes))
        saved -= parts[name].saved_bytes
        gradients += weights[name] * left.get(name, 1)
        left[name] = 0 if name in spec.shared else 1
    everything, table = element * counts.total, element * counts.head if spec.tie_word_embeddings else 0.0
    moments += [Worst(everything, table + 2 * stream), Worst(everything, _update(spec, request) / cards)]
    return max(moments, key=sum)


def _kept(spec: ModelSpec, name: str, request: Request, step: Step) -> Live:
    """What a sublayer saves under `request.recompute`, and the most it has alive beside that when its turn comes backward:
    what is computed again, whose peak as it is made is no more than when gradients are on their way."""
    live = sublayer_live(spec, name, step)
    if request.recompute == "none":
        return live
    stream = _stream(spec, step)
    products = stream if request.recompute == "full" else stream + _products(spec, name, step)
    kept = min(products, live.saved_bytes)
    again = max(live.peak_bytes, live.saved_bytes + live.backward_bytes) - kept
    return Live(peak_bytes=live.peak_bytes, saved_bytes=kept, backward_bytes=again)


def _products(spec: ModelSpec, name: str, step: Step) -> float:
    """Bytes of the results of single matrix products and of attention, which selective recomputation keeps."""
    found = 0.0
    for op in spec.blocks[name].work(spec.hidden_size, step):
        if op.kind == "gemm" and not op.batched:
            found += op.shape[0] * op.shape[2] * op.count
        elif op.kind == "attention":
            found += op.shape[0] * op.shape[1] * op.shape[3] * op.shape[6]
    return found * step.element_bytes


def _update(spec: ModelSpec, request: Request) -> float:
    """What the optimizer has alive while it moves the largest tensor: two more of its size."""
    if request.optimizer == "sgd":
        return 0.0
    parameters = spec.parameters()
    largest = max(parameters.table, parameters.head)
    return 2.0 * largest * (4 if request.precision == "fp32" or request.master_weights else 2)


def _stream(spec: ModelSpec, step: Step) -> float:
    return float(step.tokens * spec.hidden_size * step.element_bytes)
