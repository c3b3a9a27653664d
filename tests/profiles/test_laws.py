"""Laws that hold for every model and machine: asking for more never costs less."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import Hardware, describe, known
from archcompass.profiles.predict import Prediction, predict
from archcompass.profiles.request import Request

ROOM = 10**15  # memory enough for anything, so that every question has a speed

few = settings(max_examples=25, deadline=None)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "width": draw(st.sampled_from([256, 512, 1024, 4096])),
        "depth": draw(st.integers(1, 24)),
        "family": draw(st.sampled_from(["attention mlp", "attention moe", "mamba", "mamba mlp | attention moe"])),
        "window": draw(st.sampled_from([None, 128, 4096])),
    }


def build(width: int, depth: int, family: str, window: int | None) -> ModelSpec:
    every = {
        "attention": {"kind": "attention", "num_attention_heads": width // 64, "num_key_value_heads": width // 128}
        | {"head_dim": 64, "sliding_window": window},
        "mlp": {"kind": "gated_mlp", "intermediate_size": 3 * width},
        "moe": {"kind": "moe", "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": width},
        "mamba": {"kind": "mamba2", "num_heads": width // 32, "head_dim": 64, "state_size": 64},
    }
    used = {name: block for name, block in every.items() if name in family.split()}
    return ModelSpec.model_validate(
        {"name": "law", "hidden_size": width, "vocab_size": 32000, "layers": f"{depth}*({family})", "blocks": used}
    )


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    card = draw(st.sampled_from(known()))
    return describe(vram=ROOM, bandwidth=card.bandwidth_bytes_per_second / 1e9, tflops=card.rate("bf16") / 1e12)


def assert_never_less(little: Prediction, much: Prediction) -> None:
    assert much.memory.total_bytes >= little.memory.total_bytes
    for phase in ("prefill_ms", "decode_ms_per_token"):
        assert getattr(much, phase) >= getattr(little, phase) * (1 - 1e-9)


@few
@given(models(), machines(), st.integers(1, 40_000), st.integers(1, 40_000), st.integers(1, 9))
def test_more_context_never_costs_less(
    shape: dict[str, Any], card: Hardware, prompt: int, more: int, batch: int
) -> None:
    spec = build(**shape)
    asked = [Request(prompt=length, generate=16, batch=batch) for length in (prompt, prompt + more)]
    assert_never_less(*(predict(spec, request, card) for request in asked))


@few
@given(models(), machines(), st.integers(1, 300), st.integers(1, 100), st.sampled_from([1, 100, 4096]))
def test_more_sequences_never_cost_less(
    shape: dict[str, Any], card: Hardware, batch: int, more: int, prompt: int
) -> None:
    spec = build(**shape)
    asked = [Request(prompt=prompt, generate=16, batch=count, prefill_tokens=2**22) for count in (batch, batch + more)]
    assert_never_less(*(predict(spec, request, card) for request in asked))


@few
@given(models(), machines(), st.integers(1, 8))
def test_more_layers_never_cost_less(shape: dict[str, Any], card: Hardware, more: int) -> None:
    deeper = shape | {"depth": shape["depth"] + more}
    assert_never_less(*(predict(build(**one), Request(prompt=700), card) for one in (shape, deeper)))


@few
@given(models(), machines())
def test_more_width_never_costs_less(shape: dict[str, Any], card: Hardware) -> None:
    wider = shape | {"width": shape["width"] * 2}
    assert_never_less(*(predict(build(**one), Request(prompt=700), card) for one in (shape, wider)))


@few
@given(models(), machines(), st.floats(1.0, 8.0))
def test_a_better_machine_is_never_slower(shape: dict[str, Any], card: Hardware, factor: float) -> None:
    spec, rate, bandwidth = build(**shape), card.rate("bf16") / 1e12, card.bandwidth_bytes_per_second / 1e9
    base = predict(spec, Request(prompt=2000), card)
    for better in (
        describe(vram=ROOM, bandwidth=bandwidth * factor, tflops=rate),
        describe(vram=ROOM, bandwidth=bandwidth, tflops=rate * factor),
    ):
        made = predict(spec, Request(prompt=2000), better)
        assert made.prefill_ms is not None
        assert made.decode_ms_per_token is not None
        assert made.prefill_ms <= (base.prefill_ms or 0) * (1 + 1e-9)
        assert made.decode_ms_per_token <= (base.decode_ms_per_token or 0) * (1 + 1e-9)


@few
@given(models(), machines(), st.integers(1, 64))
def test_lower_precision_never_needs_more_memory(shape: dict[str, Any], card: Hardware, batch: int) -> None:
    spec = build(**shape)
    for order in (
        ("fp32", "bf16", "int8", "fp8", "nvfp4", "int4"),
        ("bf16", "mxfp4"),  # of the experts alone, where there are any
        ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"),
    ):
        sizes = [predict(spec, Request(precision=name, batch=batch), card).memory.weights_bytes for name in order]
        assert sizes == sorted(sizes, reverse=True)
    caches = [
        predict(spec, Request(kv_precision=name, batch=batch), card).memory.state_bytes
        for name in ("fp32", "bf16", "fp8", "int4")
    ]
    assert caches == sorted(caches, reverse=True)


@few
@given(models(), machines())
def test_the_same_question_has_the_same_answer(shape: dict[str, Any], card: Hardware) -> None:
    first, second = (predict(build(**shape), Request(prompt=300), card) for _ in range(2))
    assert first == second
