"""The ledger against byte counts that anyone can check by hand, and its order."""

import pytest

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import published
from archcompass.errors import InputError, UnknownNameError
from archcompass.profiles.hardware import find
from archcompass.profiles.ledger import Memory, memory
from archcompass.profiles.request import Request


def held(spec: ModelSpec, gpu: str = "h200", **asked: object) -> Memory:
    return memory(spec, Request(**asked), find(gpu))  # type: ignore[arg-type]


def test_llama_keeps_131072_bytes_a_token(llama: ModelSpec) -> None:
    one = held(llama, prompt=1000, generate=0).state_bytes
    two = held(llama, prompt=2000, generate=0).state_bytes
    assert (two - one) / 1000 == 131_072
    assert one == 131_072_000


def test_state_grows_with_the_batch_and_shrinks_with_the_precision_of_the_cache(llama: ModelSpec) -> None:
    base = held(llama, prompt=4096, generate=0).state_bytes
    assert held(llama, prompt=4096, generate=0, batch=7).state_bytes == 7 * base
    assert held(llama, prompt=4096, generate=0, kv_precision="fp8").state_bytes == base / 2
    assert held(llama, prompt=4096, generate=0, kv_precision="fp32").state_bytes == base * 2


def test_generated_tokens_are_kept_too(llama: ModelSpec) -> None:
    assert held(llama, prompt=1000, generate=24).state_bytes == 131_072 * 1024


def test_weights_in_bf16_are_two_bytes_each(llama: ModelSpec) -> None:
    assert held(llama).weights_bytes == 8_030_261_248 * 2


def test_quantised_weights_say_what_stays_in_high_precision(llama: ModelSpec) -> None:
    ledger = held(llama, precision="int4")
    assert ledger.detail["weights: matrices"] == 6_979_321_856 * (4 + 20 / 128) / 8
    assert ledger.detail["weights: embedding and head"] == 2 * 128256 * 4096 * 2
    assert any("stay in 16 bits" in note for note in ledger.notes)


@pytest.mark.parametrize(("name", "file_gib"), [("gpt-oss-20b", 12.833), ("gpt-oss-120b", 60.868)])
def test_mxfp4_shrinks_the_experts_alone(name: str, file_gib: float) -> None:
    """Sizes of the files: lhl/strix-halo-testing, llm-bench."""
    ledger = held(published(name), precision="mxfp4")
    assert ledger.weights_bytes == pytest.approx(file_gib * 2**30, rel=0.005)
    assert any("all but the experts" in note for note in ledger.notes)


def test_recurrent_state_does_not_grow(families: dict[str, ModelSpec]) -> None:
    short, long = (held(families["ssm"], prompt=length, generate=0) for length in (64, 65536))
    assert short.state_bytes == long.state_bytes
    conv, recurrent = 3 * (4 * 32 + 2 * 16) * 2, 4 * 16 * 32 * 4
    assert short.state_bytes == 3 * (conv + recurrent)


def test_a_window_bounds_the_cache(families: dict[str, ModelSpec]) -> None:
    short, long = (held(families["hybrid"], prompt=length, generate=0) for length in (24, 9000))
    assert short.state_bytes == long.state_bytes


def test_a_long_prompt_is_computed_in_chunks(llama: ModelSpec) -> None:
    chunk, long = (held(llama, prompt=length).activation_bytes for length in (8192, 131072))
    assert long <= 1.01 * chunk
    assert held(llama, prompt=65536, prefill_tokens=65536).activation_bytes > 7 * chunk


def test_the_total_is_the_sum_of_its_parts(tiny: ModelSpec) -> None:
    ledger = held(tiny, prompt=300, generate=20, batch=3)
    parts = ledger.weights_bytes + ledger.state_bytes + ledger.activation_bytes + ledger.overhead_bytes
    assert ledger.total_bytes == parts
    assert sum(ledger.detail.values()) == pytest.approx(ledger.total_bytes)
    assert ledger.margin_bytes == ledger.capacity_bytes - ledger.per_card_bytes


def test_671_billion_parameters_in_fp8_do_not_fit_eight_cards_of_80_gb(giant: ModelSpec) -> None:
    ledger = held(giant, "8x h100-sxm", precision="fp8", prompt=4096)
    assert giant.parameters().total > 660e9
    assert not ledger.fits
    assert ledger.total_bytes > find("8x h100-sxm").total_memory_bytes
    assert held(giant, "8x h200", precision="fp8", prompt=4096).fits


def test_cards_share_weights_and_copy_what_cannot_be_split(llama: ModelSpec) -> None:
    one, four = held(llama, "h100-sxm", prompt=4096), held(llama, "4x h100-sxm", prompt=4096)
    assert four.per_card_bytes < one.per_card_bytes / 2
    assert four.weights_bytes == pytest.approx(one.weights_bytes, rel=1e-3)
    # Heads and hidden channels are shared out, the stream is on every card.
    assert one.activation_bytes / 4 < four.activation_bytes / 4 < one.activation_bytes / 2
    sixteen = held(llama, "16x h100-sxm", prompt=4096)
    assert sixteen.state_bytes == 2 * one.state_bytes  # 8 key heads on 16 cards: every head twice
    assert any("copies" in note for note in sixteen.notes)


def test_training_holds_gradients_and_moments(llama: ModelSpec) -> None:
    ledger = held(llama, "h200", mode="training", prompt=512, generate=0)
    assert ledger.detail["training: gradients"] == 8_030_261_248 * 2  # so few tokens: the update is the worst moment
    assert ledger.detail["training: optimizer"] == 8_030_261_248 * 8
    assert ledger.state_bytes == 0
    eight_bit = held(llama, "h200", mode="training", prompt=512, optimizer="adamw-8bit")
    assert eight_bit.detail["training: optimizer"] < ledger.detail["training: optimizer"] / 3


def test_recomputing_keeps_less(llama: ModelSpec) -> None:
    kept = [
        held(llama, "8x h200", mode="training", prompt=2048, batch=64, recompute=how).total_bytes
        for how in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_gradients_come_as_activations_go(llama: ModelSpec) -> None:
    """With many tokens the worst moment is the loss, when there are no gradients yet."""
    few, many = (held(llama, "h200", mode="training", prompt=size, batch=64) for size in (16, 4096))
    assert few.detail["training: gradients"] == 8_030_261_248 * 2
    assert many.detail["training: gradients"] < few.detail["training: gradients"] / 5
    assert many.activation_bytes > few.activation_bytes + few.detail["training: gradients"]


@pytest.mark.parametrize(
    "asked",
    [{"batch": 0}, {"batch": -1}, {"prompt": 0}, {"prompt": 2.5}, {"generate": -1}, {"prompt": True}, {"prompt": 2**50},
     {"mode": "training", "precision": "int4"}],
)  # fmt: skip
def test_impossible_numbers_are_refused(asked: dict[str, object]) -> None:
    with pytest.raises(InputError) as refused:
        Request(**asked)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    assert next(reversed(asked)) in str(refused.value)


@pytest.mark.parametrize(
    "asked",
    [{"precision": "int5"}, {"kv_precision": "fp9"}, {"mode": "train"}, {"engine": "vlm"}, {"optimizer": "adam"}],
)
def test_unknown_choices_are_refused_with_the_nearest(asked: dict[str, str]) -> None:
    with pytest.raises(UnknownNameError, match="nearest"):
        Request(**asked)  # type: ignore[arg-type]


def test_an_optimizer_in_8_bits_keeps_two_bytes_a_weight_and_scales_of_256(llama: ModelSpec) -> None:
    request = Request(mode="training", prompt=64, generate=0, optimizer="adamw-8bit")
    held = memory(llama, request, find("h200")).detail["training: optimizer"]
    assert held == llama.parameters().total * (2 + 2 * 4 / 256)
