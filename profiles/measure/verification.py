"""The checks of `verify` that need tensors: counts and states on `meta`, steps against one forward in real numbers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from archcompass.blocks.base import Op, Step
from archcompass.blocks.hf.configuration import family
from archcompass.blocks.model.module import LanguageModel
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.precision import FP32
from archcompass.errors import SpecError
from archcompass.profiles.measure.build import model as build_model
from archcompass.profiles.verify import Check

PROMPT, STEPS = 48, 6

MAX_PARAMETERS, MAX_DOUBLES = 160_000_000, 80_000_000

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
"""Of the largest logit."""


def parameters(spec: ModelSpec) -> Check:
    """The whole model on `meta` holds what the blocks say, and its family's table names each tensor once."""
    model = spec.build(device="meta")
    said, found = spec.parameters().total, sum(parameter.numel() for parameter in model.parameters())
    detail = f"{said:,} said, {found:,} built"
    if said != found or spec.model_type is None:
        return Check("parameters", said == found, detail)
    named = {weight.ours for weight in family(spec.model_type).weights(spec)}
    if stray := sorted(named ^ set(model.state_dict())):
        return Check("parameters", False, f"{detail}; {stray[0]} is on one side only of the {spec.model_type} table")
    return Check("parameters", True, f"{detail}, {len(named):,} tensors named for {spec.model_type}")


def flops(once: ModelSpec) -> Check:
    """A prompt and a step cost what the blocks say, as torch counts them. Counters know no masks: full rectangles."""
    model = once.build(device="meta")
    details = []
    for step in (_step(PROMPT, 0), _step(1, PROMPT)):
        said = sum(_counted(op) for op in once.work(step))
        found = _run(model, step)
        details.append(f"{said:,.0f} said, {found:,} counted")
        if said != found:
            return Check("FLOPs", False, f"{details[-1]} for {step.new_tokens} tokens after {step.past_tokens}")
    return Check("FLOPs", True, f"prompt of {PROMPT}: {details[0]}; step: {details[1]}; every block once, full width")


def state(once: ModelSpec) -> Check:
    """What lives between calls takes the bytes that the blocks say."""
    model, step = once.build(device="meta"), _step(1, PROMPT)
    with torch.no_grad():
        out = model(_ids(PROMPT, once, "meta"))
        out = model(_ids(1, once, "meta"), out.state)
    said, found = once.state_bytes(step), out.state.nbytes
    detail = f"{said:,.0f} bytes said, {found:,} held after {step.context} tokens, every block once, float32"
    return Check("state", said == found, detail)


def steps(once: ModelSpec) -> Check:
    """A prompt in two segments and single steps give the logits of one forward."""
    small = narrowed(once)
    dtype = torch.float64 if small.parameters().total <= MAX_DOUBLES else torch.float32
    model = build_model(small, torch.device("cpu"), dtype)
    ids = _ids(PROMPT + STEPS, small, "cpu")
    cuts = [0, PROMPT // 3, PROMPT, *range(PROMPT + 1, PROMPT + STEPS + 1)]
    with torch.inference_mode():
        whole = model(ids).logits
        out, parts = None, []
        for start, end in pairwise(cuts):
            out = model(ids[:, start:end], None if out is None else out.state)
            parts.append(out.logits)
    error = float((torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
    size = "full width" if small.hidden_size == once.hidden_size else f"width {small.hidden_size} of {once.hidden_size}"
    detail = f"{error:.1e} of the largest logit, {str(dtype).removeprefix('torch.')}, every block once, {size}"
    return Check("decode equals forward", error < TOLERANCE[dtype], detail)


def narrowed(spec: ModelSpec) -> ModelSpec:
    """The model at half the width, again and again, until it is small enough or its blocks can be no narrower."""
    small = spec.model_copy(update={"vocab_size": min(spec.vocab_size, 512)})
    small = ModelSpec.model_validate(small.model_dump())
    while small.parameters().total > MAX_PARAMETERS and small.hidden_size % 2 == 0:
        try:
            small = ModelSpec.model_validate(small.model_dump() | {"hidden_size": small.hidden_size // 2})
        except SpecError:
            break
    return small


def _step(new_tokens: int, past_tokens: int) -> Step:
    return Step(
        new_tokens=new_tokens,
        past_tokens=past_tokens,
        activations="fp32",
        precision=FP32,
        cache_precision=FP32,
        logits_to_keep=0,
    )


def _counted(op: Op) -> float:
    """FLOPs of an operation as a counter sees it: attention without its mask."""
    if op.kind != "attention":
        return op.flops * op.count
    batch, heads, _, new_tokens, keys, key_dim, value_dim = op.shape
    return 2.0 * batch * heads * new_tokens * keys * (key_dim + value_dim) * op.count


def _run(model: LanguageModel, step: Step) -> int:
    with torch.no_grad():
        before = model(_ids(step.past_tokens, model.spec, "meta")).state if step.past_tokens else None
        with FlopCounterMode(display=False) as counter:
            model(_ids(step.new_tokens, model.spec, "meta"), before)
    return int(counter.get_total_flops())


def _ids(count: int, spec: ModelSpec, device: str) -> torch.Tensor:
    """[1, count] tokens, no two neighbours alike."""
    return (torch.arange(count, device=device) * 7919 % spec.vocab_size)[None]
