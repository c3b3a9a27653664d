"""The ledger asked backwards gives the very edge."""

from dataclasses import replace

import pytest

from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.hardware import find
from archcompass.profiles.inverse import largest_batch, longest_context, smallest_machine
from archcompass.profiles.ledger import memory
from archcompass.profiles.request import Request


def test_the_longest_context_fits_and_one_token_more_does_not(llama: ModelSpec) -> None:
    card, request = find("rtx-4090"), Request(precision="bf16", generate=0)
    longest = longest_context(llama, request, card)
    assert longest is not None
    assert 30_000 < longest < 80_000
    assert memory(llama, replace(request, prompt=longest), card).fits
    assert not memory(llama, replace(request, prompt=longest + 1), card).fits


@pytest.mark.parametrize("prompt", [1024, 1500, 2048, 3000, 5000])
def test_the_largest_batch_fits_and_one_more_does_not(llama: ModelSpec, prompt: int) -> None:
    request, card = Request(prompt=prompt, generate=64), find("h100-sxm")
    most = largest_batch(llama, request, card)
    assert memory(llama, replace(request, batch=most), card).fits
    assert not memory(llama, replace(request, batch=most + 1), card).fits


def test_constant_state_has_no_longest_context(families: dict[str, ModelSpec]) -> None:
    assert longest_context(families["ssm"], Request(), find("rtx-4090")) is None


def test_what_does_not_fit_at_all_has_length_zero(giant: ModelSpec) -> None:
    assert longest_context(giant, Request(precision="fp8"), find("rtx-4090")) == 0
    assert largest_batch(giant, Request(precision="fp8"), find("8x h100-sxm")) == 0


def test_the_smallest_machine_is_the_smallest(llama: ModelSpec, giant: ModelSpec) -> None:
    small = smallest_machine(llama, Request(precision="int4", prompt=2048))
    assert small is not None
    assert small.count == 1
    assert small.memory_bytes < 10 * 2**30
    large = smallest_machine(giant, Request(precision="fp8", prompt=2048), [find("h200"), find("h100-sxm")])
    assert large is not None
    assert (large.id, large.count) == ("h200", 8)
    assert smallest_machine(giant, Request(), [find("rtx-4090")]) is None
