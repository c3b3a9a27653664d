"""The block contract, over every block of the registry: a newcomer inherits these tests by its `tiny()`."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from archcompass.blocks.base import TINY_WIDTH, AnyBlock, Block, Op, Step, known_blocks
from archcompass.blocks.precision import PRECISIONS
from archcompass.blocks.runtime import BlockModule, BlockState, Context, initialise
from archcompass.blocks.zoo import names, published

CASES = [
    pytest.param(spec, id=f"{kind}-{index}")
    for kind, block in known_blocks().items()
    for index, spec in enumerate(block.tiny())
]
TIMED = [case for case in CASES if case.values[0].traits.role in ("mixer", "channel")]
BATCH, TIME = 2, 23


def build(spec: Block, dtype: torch.dtype = torch.float64, device: str = "cpu") -> BlockModule:
    """The module with every parameter moved off its start, so that no bias is zero and no norm is one."""
    return _built(spec.model_dump_json(), type(spec), dtype, device)


@lru_cache(maxsize=8)
def _built(said: str, kind: type[Block], dtype: torch.dtype, device: str) -> BlockModule:
    spec = kind.model_validate_json(said)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = spec.build(TINY_WIDTH)
    finally:
        torch.set_default_dtype(before)
    if device != "meta":
        initialise(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return module.eval()


def sample(spec: Block, batch: int = BATCH, time: int = TIME, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    if spec.traits.role == "embedding":
        return torch.randint(0, 50, (batch, time))
    return torch.randn(batch, time, TINY_WIDTH, dtype=torch.float64).to(dtype)


def call(
    module: BlockModule, x: Tensor, state: BlockState | None = None, past: int = 0, padding: Tensor | None = None
) -> tuple[Tensor, BlockState | None]:
    """One forward call, as a model makes it. The embeddings that a block may look at again are some function of x."""
    return module(x, state, Context(past=past, padding=padding, embeddings=0.5 * x.flip(-1)))


def by_segments(module: BlockModule, x: Tensor, cuts: list[int], padding: Tensor | None = None) -> Tensor:
    """The outputs of successive calls on x cut at `cuts`."""
    state, outputs = None, []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = call(module, x[:, start:end], state, start, padding)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def dense_flops(op: Op) -> float:
    """FLOPs as counters see them: they know no masks, so attention is its full rectangle. The one place that converts."""
    if op.kind != "attention":
        return op.flops * op.count
    batch, heads, _, new_tokens, keys, key_dim, value_dim = op.shape
    return 2.0 * batch * heads * new_tokens * keys * (key_dim + value_dim) * op.count


def total_flops(spec: Block, step: Step) -> float:
    return sum(dense_flops(op) for op in spec.work(TINY_WIDTH, step))


@pytest.mark.parametrize("spec", CASES)
def test_parameters_are_those_of_the_module(spec: Block) -> None:
    module = build(spec, torch.float32, "meta")
    assert spec.parameters(TINY_WIDTH).total == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("spec", TIMED)
def test_a_twin_shares_all_but_what_every_place_has_for_itself(spec: Block) -> None:
    first = build(spec, torch.float32, "meta")
    with torch.device("meta"):
        both = nn.ModuleList([first, first.twin(1)])
    own, all_of_it = spec.own_parameters(TINY_WIDTH), spec.parameters(TINY_WIDTH)
    assert sum(parameter.numel() for parameter in both.parameters()) == (all_of_it + own).total


@pytest.mark.parametrize("spec", CASES)
def test_idle_parameters_are_those_one_token_never_reads(spec: Block) -> None:
    """A slice is idle when poison in it cannot be tasted."""
    parameters = spec.parameters(TINY_WIDTH)
    if not spec.traits.sparse_activation:
        assert parameters.idle == 0
        return
    module, x, idle = build(spec), sample(spec, 1, 1), 0
    with torch.inference_mode():
        for parameter in module.parameters():
            for part in parameter:
                kept = part.clone()
                part.fill_(torch.nan)
                idle += part.numel() * bool(call(module, x)[0].isfinite().all())
                part.copy_(kept)
    assert parameters.idle == idle


STEPS = [
    pytest.param(Step(batch=BATCH, new_tokens=32, activations="fp32", logits_to_keep=0), id="prompt"),
    pytest.param(Step(batch=BATCH, new_tokens=16, past_tokens=32, activations="fp32", logits_to_keep=0), id="segment"),
    pytest.param(Step(batch=BATCH, new_tokens=1, past_tokens=34, activations="fp32", logits_to_keep=0), id="step"),
]


def meta_call(spec: Block, step: Step) -> tuple[BlockModule, Tensor, BlockState | None]:
    """A module on meta, its input and its state as `step` has them."""
    module = build(spec, torch.float32, "meta")
    past = sample(spec, step.batch, step.past_tokens, torch.float32).to("meta")
    state = call(module, past)[1] if step.past_tokens else None
    return module, sample(spec, step.batch, step.new_tokens, torch.float32).to("meta"), state


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("spec", CASES)
def test_flops_are_those_torch_counts(spec: Block, step: Step) -> None:
    module, x, state = meta_call(spec, step)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(module, x, state, step.past_tokens)
    assert total_flops(spec, step) == counter.get_total_flops()


class Alone(nn.Module):
    """A block with tensors alone for results, as counters that trace want it; what nothing comes of they would drop."""

    def __init__(self, module: BlockModule, state: BlockState | None, past: int) -> None:
        super().__init__()
        self.module, self.state, self.past = module, state, past

    def forward(self, x: Tensor) -> list[Tensor]:
        y, state = call(self.module, x, self.state and self.state.copy(), self.past)
        return [y, *(state.tensors().values() if state is not None else [])]


# Every instance with a step, and the first of each kind with a prompt: tracing a long recurrence is slow.
TRACED = [pytest.param(*case.values, STEPS[2].values[0], id=f"{case.id}-step") for case in CASES]
TRACED += [
    pytest.param(*case.values, STEPS[0].values[0], id=f"{case.id}-prompt")
    for case in CASES
    if str(case.id).endswith("-0")
]


@pytest.mark.parametrize(("spec", "step"), TRACED)
def test_flops_are_those_fvcore_counts(spec: Block, step: Step, fvcore_flops: Callable[..., int]) -> None:
    module, x, state = meta_call(spec, step)
    with torch.no_grad():
        counted = fvcore_flops(Alone(module, state, step.past_tokens), (x,))
    assert total_flops(spec, step) == counted


def published_blocks() -> Iterator[Any]:
    """Each block of each published model once, with its width; the id names the first model that has it."""
    seen = set[tuple[str, int]]()
    for name, model in ((name, published(name)) for name in names()):
        for part, block in model.blocks.items():
            key = (block.model_dump_json(), model.hidden_size)
            if key not in seen:
                seen.add(key)
                yield pytest.param(block, model.hidden_size, id=f"{name}-{part}")


@pytest.mark.parametrize(("spec", "width"), list(published_blocks()))
def test_flops_of_published_blocks_are_those_fvcore_counts(
    spec: Block, width: int, fvcore_flops: Callable[..., int]
) -> None:
    step = Step(batch=1, past_tokens=3, new_tokens=1)
    with torch.device("meta"), torch.no_grad():
        module = spec.build(width).eval()
        state = call(module, torch.empty(1, step.past_tokens, width))[1]
        counted = fvcore_flops(Alone(module, state, step.past_tokens), (torch.empty(1, 1, width),))
    assert sum(dense_flops(op) for op in spec.work(width, step)) == counted


@pytest.mark.parametrize("spec", CASES)
def test_training_pays_three_times_the_forward(spec: Block) -> None:
    forward, training = (Step(batch=2, new_tokens=32, logits_to_keep=0, training=flag) for flag in (False, True))
    once, thrice = (sum(op.flops * op.count for op in spec.work(TINY_WIDTH, step)) for step in (forward, training))
    assert thrice == 3 * once


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", CASES)
def test_state_is_what_the_spec_says(spec: Block, name: Any) -> None:
    """Names, shapes and bytes; also the output keeps the input's dtype."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    step = Step(batch=BATCH, new_tokens=TIME, activations=name, cache_precision=PRECISIONS[name])
    said = spec.state(TINY_WIDTH, TIME)
    with torch.inference_mode():
        y, state = call(build(spec, dtype), sample(spec, dtype=dtype))
    kept = {} if state is None else state.tensors()
    assert {tensor.name: (BATCH, *tensor.shape) for tensor in said} == {key: tuple(t.shape) for key, t in kept.items()}
    assert sum(tensor.bytes(step) for tensor in said) * BATCH == (state.nbytes if state is not None else 0)
    assert y.dtype == dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("spec", CASES)
def test_traits_agree_with_the_state(spec: Block) -> None:
    short, long = (sum(t.elements for t in spec.state(TINY_WIDTH, context)) for context in (2**14, 2**15))
    assert spec.traits.bounded_state == (short == long)
    assert any(t.grows for t in spec.state(TINY_WIDTH, 1)) == (not spec.traits.bounded_state)
    assert not spec.state(TINY_WIDTH, 1) or spec.traits.mixes_time


@pytest.mark.parametrize("spec", CASES)
def test_segments_and_single_steps_are_one_forward(spec: Block) -> None:
    module, x = build(spec), sample(spec)
    with torch.inference_mode():
        whole = call(module, x)[0]
        segments = by_segments(module, x, [9, 10, 12])
        steps = by_segments(module, x, list(range(1, TIME)))
    torch.testing.assert_close(segments, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", TIMED)
def test_a_copied_state_is_independent(spec: Block) -> None:
    module, x = build(spec), sample(spec)
    with torch.inference_mode():
        state = call(module, x[:, :9])[1]
        branch = state and state.copy()
        first = call(module, x[:, 9:12], state, 9)[0]
        call(module, x[:, 12:13], state, 12)
        second = call(module, x[:, 9:12], branch, 9)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("spec", TIMED)
def test_no_output_depends_on_a_later_token(spec: Block) -> None:
    module, x = build(spec), sample(spec)
    changed = x.clone()
    changed[:, 14:] += 1.0
    with torch.inference_mode():
        before, after = call(module, x)[0], call(module, changed)[0]
    torch.testing.assert_close(before[:, :14], after[:, :14], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before[:, 14], after[:, 14])
    with torch.inference_mode():
        without_past = call(module, x[:, 13:])[0]
    assert spec.traits.mixes_time == (not torch.allclose(without_past, before[:, 13:], rtol=1e-9))


@pytest.mark.parametrize("spec", TIMED)
def test_left_padding_changes_no_row(spec: Block) -> None:
    module, x, left = build(spec), sample(spec), 6
    alone = x[1:, : TIME - left]
    padded = torch.cat([x[:1], torch.cat([7.0 * x[1:, -left:], alone], dim=1)])
    padding = torch.tensor([0, left])
    with torch.inference_mode():
        rows = [call(module, x[:1])[0], call(module, alone)[0]]
        whole = call(module, padded, padding=padding)[0]
        segments = by_segments(module, padded, [4, 9, 22], padding)
    for y in (whole, segments):
        torch.testing.assert_close(y[:1], rows[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(y[1:, left:], rows[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", CASES)
def test_rows_of_a_batch_are_strangers(spec: Block) -> None:
    module, x = build(spec), sample(spec)
    with torch.inference_mode():
        together = call(module, x)[0]
        alone = torch.cat([call(module, row[None])[0] for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", CASES)
def test_gradients_reach_every_parameter_and_are_right(spec: Block) -> None:
    """Gradcheck along random directions, of the input and of all parameters at once."""
    module, x = build(spec), sample(spec, 2, 9)
    if not any(True for _ in module.parameters()):
        assert torch.autograd.gradcheck(lambda x: module(x)[0], (x.requires_grad_(),), fast_mode=True)
        return
    named = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    x = x.requires_grad_() if x.is_floating_point() else x

    def outputs(context: Context, x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(named, values, strict=True)), (x, None, context))[0]

    def fresh(x: Tensor) -> Context:
        return Context(keep_state=False, embeddings=0.5 * x.flip(-1))

    context = fresh(x)
    module.train()
    loss = outputs(context, x, *named.values()).square().sum() + sum(sum(parts) for parts in context.losses.values())
    module.eval()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    untouched = [name for name, g in zip(named, gradients, strict=True) if g is None or not g.any()]
    assert not untouched
    tensors = (x, *named.values())
    assert torch.autograd.gradcheck(lambda x, *values: outputs(fresh(x), x, *values), tensors, fast_mode=True)


@pytest.mark.parametrize("spec", CASES)
def test_a_spec_survives_yaml_and_json(spec: Block) -> None:
    adapter = TypeAdapter(AnyBlock)
    assert adapter.validate_python(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json")))) == spec
    assert adapter.validate_python(json.loads(spec.model_dump_json())) == spec
    assert adapter.validate_python(spec.model_dump(mode="json", exclude_defaults=True)) == spec


@pytest.mark.parametrize("spec", CASES)
def test_unknown_keys_are_refused(spec: Block) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(spec).model_validate(spec.model_dump() | {"no_such_field": 1})


@pytest.mark.parametrize("kind", known_blocks())
def test_tiny_instances_differ_and_name_themselves(kind: str) -> None:
    specs = known_blocks()[kind].tiny()
    assert specs
    assert all(spec.kind == kind for spec in specs)
    assert len({spec.model_dump_json() for spec in specs}) == len(specs)
    assert specs[0].label


@pytest.mark.parametrize("kind", known_blocks())
def test_instances_of_ordinary_size_can_be_built(kind: str) -> None:
    typical = known_blocks()[kind].typical()
    if typical is None:
        return
    for spec in (typical[0], *known_blocks()[kind].other_sizes()):
        with torch.device("meta"):
            module = spec.build(typical[1])
        assert spec.kind == kind
        assert sum(parameter.numel() for parameter in module.parameters()) == spec.parameters(typical[1]).total
