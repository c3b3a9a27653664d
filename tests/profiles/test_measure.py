"""Measuring: real blocks run, the ledger agrees with the memory they really take, big models are sampled."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import InputError, MeasurementError
from archcompass.profiles.hardware import describe, find
from archcompass.profiles.ledger import memory
from archcompass.profiles.measure import build, heap
from archcompass.profiles.measure.clock import Times
from archcompass.profiles.measure.model import measure, shorten
from archcompass.profiles.measure.peak import tensor_peak_bytes
from archcompass.profiles.measure.sampled import measure_blocks
from archcompass.profiles.profile import profile
from archcompass.profiles.request import Request

CPU = torch.device("cpu")
PATIENCE = 120.0
"""Seconds that no busy machine uses up: tiny models end after a set number of runs, long before."""


pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_state_and_parameters_are_byte_for_byte_the_ledgers(tiny: ModelSpec) -> None:
    request = Request(prompt=96, generate=0, precision="fp32", batch=2)
    seen = measure(tiny, request, find("cpu"), seconds=PATIENCE)
    foreseen = memory(tiny, request, find("cpu"))
    assert (seen.source, seen.request.prompt) == ("measured", 96)
    assert seen.parameters == tiny.parameters().total
    assert seen.weights_bytes == foreseen.weights_bytes
    assert seen.state_bytes == foreseen.state_bytes


def test_activations_are_near_the_ledgers(tiny: ModelSpec) -> None:
    request = Request(prompt=512, generate=0, precision="fp32")
    seen = measure(tiny, request, find("cpu"), seconds=PATIENCE)
    foreseen = memory(tiny, request, find("cpu")).activation_bytes
    assert 0.6 < foreseen / seen.activation_bytes < 1.6


def test_a_measurement_says_what_was_run(families: dict[str, ModelSpec]) -> None:
    seen = measure(families["transformer"], Request(prompt=64, generate=6), find("cpu"), seconds=PATIENCE)
    assert seen.prefill is not None
    assert seen.decode is not None
    assert seen.prefill.low <= seen.prefill.ms <= seen.prefill.high
    assert seen.ran["decode_runs"] == len(seen.decode.runs) == seen.request.generate == 6
    assert seen.ran["torch"] == torch.__version__
    assert seen.process_peak_bytes is None or seen.process_peak_bytes > seen.weights_bytes


def test_a_training_step_is_measured(families: dict[str, ModelSpec]) -> None:
    asked = Request(prompt=64, generate=0, mode="training", precision="fp32")
    seen = measure(families["hybrid"], asked, find("cpu"), seconds=PATIENCE)
    assert seen.prefill is not None
    assert seen.decode is None
    assert seen.spare_bytes >= 8 * seen.parameters  # the two moments of AdamW


def test_the_sum_of_sampled_blocks_is_near_the_whole(families: dict[str, ModelSpec]) -> None:
    spec, request, cpu = families["transformer"], Request(prompt=256, generate=4), find("cpu")
    whole = measure(spec, request, cpu, seconds=PATIENCE)
    parts = measure_blocks(spec, request, cpu, CPU, PATIENCE, lambda _share, _text: None)
    assert parts.request.prompt == whole.request.prompt == 256
    assert parts.source == "sampled"
    assert {name for name, *_ in parts.parts} == {"attention", "mlp", "head"}
    assert whole.prefill is not None
    assert parts.prefill is not None
    assert 0.2 < parts.prefill.ms / whole.prefill.ms < 5
    assert parts.decode is not None
    assert parts.prefill.low <= parts.prefill.ms <= parts.prefill.high
    assert sum(ms for *_, ms in parts.parts) == pytest.approx(parts.prefill.ms + parts.decode.ms)
    assert parts.ran["generate"] == parts.request.generate
    assert parts.ran["decode_runs"] >= 3
    assert parts.weights_bytes == whole.weights_bytes
    assert parts.state_bytes == whole.state_bytes


def test_a_model_that_no_memory_holds_is_sampled_within_its_time(giant: ModelSpec) -> None:
    fields = giant.model_dump() | {"hidden_size": 128, "vocab_size": 512, "blocks": {
        "attention": {"kind": "attention", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        "mlp": {"kind": "gated_mlp", "intermediate_size": 256},
        "moe": {"kind": "moe", "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    }}  # fmt: skip
    spec = ModelSpec.model_validate(fields)
    slow = describe(vram="4TB", bandwidth="1MB/s", tflops=1e-5)
    seen = measure(spec, Request(prompt=64, generate=2), slow, seconds=3)
    assert seen.source == "sampled"
    assert seen.parameters == spec.parameters().total
    assert any("summed by count" in note for note in seen.notes)


def test_a_prompt_that_would_take_too_long_is_shortened_and_says_so(families: dict[str, ModelSpec]) -> None:
    request = Request(prompt=2**20, generate=8)
    planned = shorten(families["transformer"], request, find("cpu"), 2.0)
    assert planned is not None
    assert planned.prompt < 2**20
    seen = measure(families["transformer"], replace(request, prompt=2**15), find("cpu"), seconds=1)
    assert seen.request.prompt == 2**15 or any("shortened" in note for note in seen.notes)


def test_quantised_weights_are_measured_in_the_dtype_they_are_widened_to(families: dict[str, ModelSpec]) -> None:
    entry = profile(families["moe"], device="cpu", precision="int4", prompt=32, generate=2, seconds=PATIENCE).profiles[
        -1
    ]
    assert (entry.source, entry.precision) == ("measured", "bf16")
    assert any("no int4 kernels" in note for note in entry.notes)


def test_prediction_and_measurement_stand_side_by_side(families: dict[str, ModelSpec]) -> None:
    told: list[str] = []
    report = profile(
        families["ssm"], gpu="rtx-4090", device="cpu", prompt=64, generate=4, seconds=PATIENCE,
        progress=lambda _share, text: told.append(text),
    )  # fmt: skip
    card, here, seen = report.profiles
    assert [card.hardware, here.hardware, seen.hardware] == ["rtx-4090", "cpu", "cpu"]
    assert (here.prompt, here.generate, here.precision) == (seen.prompt, seen.generate, seen.precision)
    assert here.prefill is not None
    assert seen.prefill is not None
    assert seen.ratio["prefill"] == pytest.approx(seen.prefill.ms / here.prefill.ms, rel=1e-3)
    assert set(seen.ratio) == {"prefill", "decode"}
    assert told


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(InputError, match="choose cpu or cuda"):
        build.device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="nearest: cpu"):
            build.device_of("cuda")


def test_times_are_told_by_median_quartiles_and_outliers() -> None:
    times = Times((1.0, 1.1, 0.9, 1.0, 9.0))
    assert (times.ms, times.outliers) == (1.0, 1)
    assert times.low <= times.ms <= times.high


def test_the_peak_of_tensors_is_exact() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(1000, dtype=torch.float32)
        second = first + 1
        del first
        return second * 2

    peak, left = tensor_peak_bytes(call, CPU)
    assert (peak, left) == (8000, 4000)


def test_fill_gives_ordinary_values_and_leaves_no_zeros() -> None:
    layer = torch.nn.Linear(1024, 1024)
    torch.nn.init.zeros_(layer.weight)
    build.fill(layer)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_fill_lets_no_token_meet_a_row_of_a_projection_in_full() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4096, 128), torch.nn.Linear(128, 4096, bias=False))
    build.fill(model)
    tokens, rows = (torch.nn.functional.normalize(weight.detach(), dim=-1) for weight in model.parameters())
    assert (tokens @ rows.mT).abs().max() < 0.7


def test_a_training_step_that_no_memory_holds_is_refused_not_sampled(families: dict[str, ModelSpec]) -> None:
    asked = Request(prompt=16, generate=0, mode="training", precision="fp32", batch=2**20)
    with pytest.raises(MeasurementError, match="too much for this machine"):
        measure(families["moe"], asked, find("cpu"), seconds=PATIENCE)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back as it pleases")
def test_the_heap_keeps_what_is_freed_while_it_is_held_and_gives_it_back_after() -> None:
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])

    with heap.held():
        faults()
        assert faults() < 2**10, "64 MiB are 2^14 pages, and none of them is new"
        kept = resident_pages()
    assert resident_pages() < kept - 2**13
