"""Predictions: the whole is the sum of its parts, sources are said, and nothing is promised that does not fit."""

import subprocess
import sys
import time

import pytest

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import published
from archcompass.profiles.hardware import find
from archcompass.profiles.predict import PIPELINE_TOKENS, owned_work, predict
from archcompass.profiles.request import Request


def test_the_whole_is_the_sum_of_its_parts(tiny: ModelSpec) -> None:
    made = predict(tiny, Request(prompt=20000, generate=64, batch=2), find("rtx-4090"))
    for call in (made.prefill, made.decode):
        assert call is not None
        assert sum(part.ms for part in call.parts) == pytest.approx(call.ms)
    assert made.prefill is not None
    assert made.prefill_ms == made.prefill.ms


def test_owned_work_is_the_models_work(tiny: ModelSpec) -> None:
    step = Request(batch=2).step(17, 5)
    assert [op for _, op in owned_work(tiny, step)] == tiny.work(step)


def test_the_flops_of_a_chunked_prefill_are_those_of_the_whole_prompt(llama: ModelSpec) -> None:
    card = find("h200")
    whole = predict(llama, Request(prompt=32768, prefill_tokens=32768), card).prefill_flops
    chunked = predict(llama, Request(prompt=32768, prefill_tokens=4096), card).prefill_flops
    assert chunked == pytest.approx(whole, rel=2e-3)  # the head runs once a chunk


def test_decode_on_a_data_sheet_is_near_what_is_known(llama: ModelSpec) -> None:
    made = predict(llama, Request(prompt=512, generate=128, precision="bf16"), find("rtx-4090"))
    assert made.source == "roofline"
    assert made.decode_ms_per_token == pytest.approx(18.4, rel=0.15)  # 54 tokens a second, llama.cpp and vLLM alike


def test_ranges_surround_the_prediction(llama: ModelSpec) -> None:
    made = predict(llama, Request(), find("l40s"))
    for phase in ("prefill", "decode"):
        assert made.low[phase] < 1 < made.high[phase]


@pytest.mark.parametrize(("cards", "pieces"), [(2, 4), (4, 8), (4, 64)])
def test_layers_on_several_cards_read_a_prompt_in_turn(llama: ModelSpec, cards: int, pieces: int) -> None:
    request = Request(prompt=PIPELINE_TOKENS * pieces, generate=16, parallel="pipeline")
    one, several = (predict(llama, request, find(f"{count}x h100-sxm")) for count in (1, cards))
    assert one.prefill_ms is not None
    assert several.prefill_ms is not None
    assert several.prefill_ms / one.prefill_ms == pytest.approx((pieces + cards - 1) / (pieces * cards), rel=0.01)
    assert several.decode_ms_per_token == pytest.approx(one.decode_ms_per_token, rel=0.01)


def test_experts_in_system_memory_are_read_at_half_its_bandwidth() -> None:
    request = Request(prompt=512, precision="q4_0", offload=1.0, ram_bytes_per_second=80e9)
    made = predict(published("qwen3-30b-a3b"), request, find("rtx-4090"))
    assert made.decode is not None
    waited = next(part.ms for part in made.decode.parts if part.name == "experts in system memory")
    read_bytes = 48 * 8 * 3 * 2048 * 768 * 4.5 / 8  # layers, experts of a token, matrices of an expert, bits of q4_0
    assert waited == pytest.approx(read_bytes / 40e9 * 1e3, rel=1e-3)


def test_what_does_not_fit_has_no_speed(giant: ModelSpec) -> None:
    made = predict(giant, Request(precision="fp8", prompt=4096), find("8x h100-sxm"))
    assert not made.fits
    assert made.prefill_ms is None
    assert made.decode_ms_per_token is None
    assert made.tokens_per_second is None
    assert "does not fit 8x H100" in made.verdict
    assert "GB" in made.verdict


def test_a_small_model_at_batch_one_is_launch_bound_and_says_so(families: dict[str, ModelSpec]) -> None:
    made = predict(families["transformer"], Request(prompt=128), find("h100-sxm"))
    assert made.decode is not None
    assert made.decode.launch_bound
    assert any("launch-bound" in note for note in made.notes)


def test_decode_of_experts_reads_those_the_batch_touches(families: dict[str, ModelSpec]) -> None:
    spec, card = families["moe"], find("rtx-4090")
    for batch, touched in ((1, 2.0), (1000, 8.0)):
        op = next(op for op in spec.work(Request(batch=batch).decode_step()) if op.kind == "grouped_gemm")
        assert op.weight_bytes == pytest.approx(touched * 64 * 64 * 2, rel=1e-3)
    assert predict(spec, Request(batch=8), card).fits


def test_training_says_the_time_of_a_step(llama: ModelSpec) -> None:
    trained = predict(llama, Request(mode="training", prompt=1024), find("8x h200"))
    forward = predict(llama, Request(prompt=1024, generate=0), find("8x h200"))
    assert trained.decode_ms_per_token is None
    assert trained.prefill_ms is not None
    assert forward.prefill_ms is not None
    assert 2.5 * forward.prefill_ms < trained.prefill_ms < 6 * forward.prefill_ms
    assert trained.prefill is not None
    assert any(part.name == "optimizer" for part in trained.prefill.parts)


def test_messages_between_cards_cost_time(llama: ModelSpec) -> None:
    made = predict(llama, Request(prompt=2048), find("4x rtx 4090"))
    assert made.decode is not None
    assert {part.name for part in made.decode.parts} >= {"all-reduce"}


def test_a_prediction_is_quick(llama: ModelSpec) -> None:
    card, request = find("rtx-4090"), Request(prompt=4096)
    predict(llama, request, card)
    start = time.process_time()
    for _ in range(50):
        predict(llama, request, card)
    assert (time.process_time() - start) / 50 < 5e-3


def test_predicting_needs_no_torch() -> None:
    code = (
        "import sys, archcompass.profiles.profile, archcompass.profiles.calibrate\n"
        "from archcompass.profiles.hardware import find; find('cpu')\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_a_fit_that_never_saw_a_kind_of_operation_does_not_claim_to_know_it() -> None:
    card, request = find("rtx-4090"), Request(prompt=1024, engine="llama.cpp")
    known, strange = (predict(published(name), request, card) for name in ("llama-3.1-8b", "mamba2-2.7b"))
    assert (known.source, strange.source) == ("calibrated", "roofline")
    assert "scan" in strange.basis
    assert strange.high["prefill"] >= known.high["prefill"]
    assert strange.low["prefill"] <= known.low["prefill"]
