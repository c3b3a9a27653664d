"""The report: the keys scripts rely on, for predictions alone (measuring has its own file)."""

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import published
from archcompass.errors import ArchcompassError, InputError
from archcompass.profiles.hardware import find
from archcompass.profiles.predict import predict
from archcompass.profiles.profile import machine, profile
from archcompass.profiles.request import Request


def dumped(spec: ModelSpec, **asked: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(profile(spec, **asked).model_dump(mode="json")))
    return data


def test_the_keys_that_scripts_rely_on_are_there(llama: ModelSpec) -> None:
    data = dumped(llama, gpu="2x RTX 4090", prompt=2048, generate=64, batch=2)
    assert {"model", "parameters", "hardware", "precision", "batch", "prompt", "generate", "profiles"} <= set(data)
    assert set(data["parameters"]) == {"total", "active", "active_without_embeddings"}
    assert data["hardware"] == "2x rtx-4090"
    (entry,) = data["profiles"]
    assert {"source", "memory", "prefill", "decode", "range", "fits"} <= set(entry)
    needed = {"weights_bytes", "state_bytes", "activation_bytes", "overhead_bytes", "total_bytes"}
    assert needed <= set(entry["memory"])
    assert set(entry["prefill"]) == {"ms", "tokens_per_second", "flops"}
    assert {"ms_per_token", "tokens_per_second"} <= set(entry["decode"])
    assert entry["source"] in ("calibrated", "roofline")


def test_the_total_is_the_sum_of_the_printed_parts(llama: ModelSpec) -> None:
    sizes = dumped(llama, gpu="8x h200", mode="training", batch=8, prompt=8192)["profiles"][0]["memory"]
    parts = ("weights_bytes", "state_bytes", "activation_bytes", "overhead_bytes", "training_bytes")
    assert sizes["total_bytes"] == sum(sizes[part] for part in parts)


def test_the_report_and_the_predictor_say_the_same(llama: ModelSpec) -> None:
    entry = profile(llama, gpu="l40s", prompt=3000, generate=100, precision="fp8").profiles[0]
    made = predict(llama, Request(prompt=3000, generate=100, precision="fp8"), find("l40s"))
    assert entry.decode is not None
    assert entry.prefill is not None
    assert entry.decode.ms_per_token == made.decode_ms_per_token
    assert entry.prefill.ms == made.prefill_ms
    assert entry.memory.total_bytes == pytest.approx(made.memory.total_bytes, abs=5)
    assert sum(part.ms for part in entry.breakdown["decode"]) == pytest.approx(made.decode_ms_per_token)


def test_a_range_surrounds_the_number(llama: ModelSpec) -> None:
    entry = profile(llama, gpu="l40s").profiles[0]
    assert entry.prefill is not None
    assert entry.range.prefill_ms is not None
    assert entry.range.prefill_ms[0] < entry.prefill.ms < entry.range.prefill_ms[1]


def test_what_does_not_fit_has_no_speed_and_says_what_it_needs(giant: ModelSpec) -> None:
    report = profile(giant, gpu="8x h100-sxm", precision="fp8")
    entry = report.profiles[0]
    assert not report.fits
    assert entry.prefill is None
    assert entry.decode is None
    assert entry.range.decode_ms_per_token is None
    assert "does not fit" in entry.verdict


def test_more_memory_can_be_claimed_and_a_card_described(llama: ModelSpec) -> None:
    assert not profile(llama, gpu="rtx-4090", prompt=60000).fits
    assert profile(llama, gpu="rtx-4090", prompt=60000, vram="48GB").fits
    described = profile(llama, vram="24GB", bandwidth="1008GB/s", tflops=165)
    assert described.hardware == "24GB 1008GB/s 165TFLOPS"
    assert described.fits


def test_one_figure_of_a_card_can_be_changed(llama: ModelSpec) -> None:
    card = find("2x h100-pcie")
    slower = machine("2x h100-pcie", bandwidth="1TB/s")
    assert slower == replace(card, bandwidth_bytes_per_second=1e12)
    half = machine(card, tflops=378)
    assert half.rate("fp8") == pytest.approx(card.rate("fp8") / 2)
    assert half.link_bytes_per_second == card.link_bytes_per_second


def test_without_a_card_the_answer_is_for_this_machine(families: dict[str, ModelSpec]) -> None:
    report = profile(families["ssm"], prompt=64, generate=4)
    assert report.hardware == "cpu"
    assert "--device cpu" in report.check


def test_this_machine_is_asked_the_same_whether_it_is_named_or_not(families: dict[str, ModelSpec]) -> None:
    asked: dict[str, Any] = {"mode": "training", "recompute": "full", "optimizer": "sgd", "master_weights": True}
    assert profile(families["ssm"], **asked).profiles == profile(families["ssm"], gpu="cpu", **asked).profiles


def test_several_cards_share_a_model_as_the_engine_does(llama: ModelSpec) -> None:
    asked = {"gpu": "2x rtx-3090", "engine": "llama.cpp", "precision": "q8_0"}
    usual, split = profile(llama, **asked), profile(llama, **asked, parallel="tensor")
    assert usual.profiles[0] == profile(llama, **asked, parallel="pipeline").profiles[0]
    assert usual.profiles[0] != split.profiles[0]
    training = profile(llama, gpu="8x h100-sxm", mode="training", batch=8)
    assert (
        training.profiles[0] == profile(llama, gpu="8x h100-sxm", mode="training", batch=8, parallel="data").profiles[0]
    )


def test_training_can_be_asked_for_in_every_way(llama: ModelSpec) -> None:
    def asked(**how: Any) -> float:
        return (
            profile(llama, gpu="8x h200", mode="training", batch=8, prompt=8192, **how).profiles[0].memory.total_bytes
        )

    assert asked(recompute="full") < asked(recompute="selective") < asked()
    assert asked(optimizer="adamw-8bit") < asked() < asked(master_weights=True)


def test_a_report_says_how_far_the_question_could_grow(llama: ModelSpec) -> None:
    found = profile(llama, gpu="rtx-4090", prompt=4096).limits
    assert found.longest_prompt is not None
    assert profile(llama, gpu="rtx-4090", prompt=found.longest_prompt).fits
    assert not profile(llama, gpu="rtx-4090", prompt=found.longest_prompt + 1).fits
    assert not profile(llama, gpu="rtx-4090", prompt=4096, batch=found.largest_batch + 1).fits
    assert found.smallest_machine is not None
    assert profile(llama, gpu=found.smallest_machine, prompt=4096).fits


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"gpu": "2x h200"}, "tensor parallel"), ({"gpu": "2x h200", "parallel": "pipeline"}, "pipeline"),
     ({"gpu": "2x h200", "mode": "training"}, "fully sharded"), ({"gpu": "h200", "mode": "finetuning"}, "QLoRA"),
     ({"gpu": "h200", "prompt": 200_000}, "more than the 131,072"), ({"gpu": "arc-pro-b60"}, "not confirmed"),
     ({"gpu": "a100-sxm-80", "precision": "fp8"}, "no products in fp8")],
)  # fmt: skip
def test_what_the_question_was_taken_to_mean_is_said(asked: dict[str, Any], said: str) -> None:
    def notes(**how: Any) -> str:
        return "\n".join(profile(published("llama-3.1-8b"), **how).profiles[0].notes)

    assert said in notes(**asked)
    assert said not in notes(gpu="h200", prompt=131_072, precision="fp8")


@pytest.mark.parametrize(
    "asked",
    [{"gpu": "rtx 9999"}, {"gpu": "rtx-4090", "batch": 0}, {"gpu": "rtx-4090", "precision": "int3"}, {"vram": "24GB"},
     {"gpu": "rtx-4090", "vram": "-3GB"}, {"device": "tpu"}, {"gpu": "rtx-4090", "mode": "training", "precision": "q4_0"}],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(asked: dict[str, Any], llama: ModelSpec) -> None:
    with pytest.raises(InputError) as refused:
        profile(llama, **asked)
    assert isinstance(refused.value, ArchcompassError)
    assert "\n" not in str(refused.value)


def test_the_check_asks_the_same_question_and_says_what_it_leaves_out(llama: ModelSpec) -> None:
    report = profile(llama, gpu="2x rtx-4090", engine="vllm", precision="int4", prompt=100_000, kv_precision="fp8")
    words = shlex.split(report.check)
    assert words[:5] == ["archcompass", "profile", "llama-3.1-8b", "--gpu", "2x rtx-4090"]
    assert words[5:] == [
        *("--precision", "int4", "--kv-precision", "fp8", "--engine", "vllm", "--prompt", "100000", "--device", "cuda")
    ]
    left = " ".join(report.unchecked)
    assert [part in left for part in ("int4 weights", "a cache in fp8", "vllm", "2 cards", "the whole model")] == [
        True
    ] * 5
    assert "all 100,000 tokens" in left


def test_the_check_repeats_the_figures_that_were_given_and_runs_where_our_blocks_do(llama: ModelSpec) -> None:
    changed = profile(llama, gpu="rtx-4090", vram="12GB", bandwidth="900GB/s", tflops=100, precision="int4")
    assert "--gpu rtx-4090 --vram 12GB --bandwidth 900GB/s --tflops 100 " in changed.check
    apple = profile(llama, gpu="m4-max-40c")
    assert apple.check.endswith("--device cpu")
    assert any("accelerator itself" in one for one in apple.unchecked)
    assert profile(llama, gpu="mi300x").check.endswith("--device cuda")


def test_a_check_that_leaves_nothing_out_says_nothing(families: dict[str, ModelSpec]) -> None:
    report = profile(families["ssm"], gpu="rtx-4090", prompt=64, generate=4)
    assert report.unchecked == []
    assert "--precision" not in report.check


def test_the_check_command_runs(families: dict[str, ModelSpec]) -> None:
    """On the machine at hand, whatever the question was about."""
    asked: dict[str, Any] = {"gpu": "rtx-4090", "precision": "int4", "prompt": 32, "generate": 2}
    report = profile(families["ssm"], **asked, device="cpu")
    assert [entry.source for entry in report.profiles][-1] == "measured"
    assert report.profiles[-1].precision == "bf16"
