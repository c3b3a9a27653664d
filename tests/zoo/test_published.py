"""Every published model against the reference implementation's count, its caches, and what its authors say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from archcompass.blocks import zoo
from archcompass.blocks.base import StateTensor
from archcompass.blocks.model.files import parse, to_yaml
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import UnknownNameError

TRUTH: dict[str, dict[str, Any]] = {
    row["name"].lower(): row
    for row in json.loads((Path(__file__).parents[1] / "data" / "published_models.json").read_text())["models"]
}
VISION_TOWER = 871_932_416
"""Parameters of Llama 4's vision tower, which the text model does not have."""

WITH_A_TOWER = {"llama-4-scout-17b-16e", "llama-4-maverick-17b-128e"}


def truth(name: str) -> dict[str, Any]:
    """The reference's figures; MiniMax-M1's own class is not in transformers, its twin is."""
    return TRUTH["minimax-m1-hf" if name == "minimax-m1" else name]


def tensors(spec: ModelSpec, context: int) -> list[tuple[int, StateTensor]]:
    return [(count, tensor) for _, count, kept in spec.state(context) for tensor in kept]


def cache_elements(spec: ModelSpec, context: int) -> int:
    return sum(count * tensor.elements for count, tensor in tensors(spec, context) if tensor.dtype == "cache")


def conv_elements(spec: ModelSpec) -> int:
    """As the reference keeps them: a convolution's window has all `kernel` columns there and one fewer here; the token a
    token shift remembers is the same on both sides."""
    total = 0
    for count, tensor in tensors(spec, 1):
        part = tensor.name.split(".")[-1]
        if part == "conv":
            taps, channels = tensor.shape
            total += count * (taps + 1) * channels
        elif part == "shift":
            total += count * tensor.elements
    return total


def recurrent_elements(spec: ModelSpec) -> int:
    return sum(count * tensor.elements for count, tensor in tensors(spec, 1) if tensor.dtype == "fp32")


def test_every_published_model_of_the_list_is_there() -> None:
    assert set(TRUTH) <= set(zoo.names())


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_parameters_are_the_reference_count(name: str) -> None:
    counted, expected = zoo.published(name).parameters(), truth(name)
    tower = VISION_TOWER if name in WITH_A_TOWER else 0
    assert counted.total + tower == expected["total_params"]
    assert counted.active_with_table + tower == expected["active_params"]
    assert counted.active + tower == expected["active_params_excl_input_embedding"]
    assert counted.active_without_embeddings + tower == expected["active_params_excl_all_embeddings"]


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_caches_and_states_are_the_reference_sizes(name: str) -> None:
    spec, expected = zoo.published(name), truth(name)
    assert 2 * (cache_elements(spec, 2) - cache_elements(spec, 1)) == expected["kv_bytes_per_token_bf16"]
    long = 10**8
    growth = 2 * (cache_elements(spec, long + 1) - cache_elements(spec, long))
    assert growth == expected["kv_bytes_per_token_bf16_unwindowed_layers"]
    bounded = sum(count * t.elements for count, t in tensors(spec, long) if t.dtype == "cache" and not t.grows)
    assert 2 * bounded == expected["kv_window_cap_bytes_bf16"]
    assert conv_elements(spec) == expected["conv_state_elems"]
    assert recurrent_elements(spec) == expected["recurrent_state_elems"]


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_is_built_on_meta_with_that_count(name: str) -> None:
    entry = zoo.entry(name)
    if entry.same_as is not None:
        assert entry.spec.parameters() == zoo.published(entry.same_as).parameters()
        return
    model = entry.spec.build(device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.spec.parameters().total


@pytest.mark.parametrize("name", zoo.names())
def test_the_published_figure_is_the_count_or_the_note_says_why_not(name: str) -> None:
    entry = zoo.entry(name)
    counted = entry.spec.parameters()
    figures = (counted.active_with_table, counted.active, counted.active_without_embeddings)
    near = abs(counted.total / entry.published.total - 1) < 0.021
    near &= min(abs(active / entry.published.active - 1) for active in figures) < 0.05
    assert near or entry.note
    assert entry.source


@pytest.mark.parametrize("name", zoo.names())
def test_a_model_file_says_it_again(name: str) -> None:
    import yaml

    spec = zoo.published(name)
    assert parse(yaml.safe_load(to_yaml(spec))) == spec


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"llama-3\.1-8b"):
        zoo.entry("lama-3.1-8b")


def test_names_are_found_however_they_are_cased() -> None:
    assert zoo.published("Llama-3.1-8B") == zoo.published("llama-3.1-8b")


def test_listing_and_looking_up_need_no_torch() -> None:
    code = "import sys; from archcompass.blocks import zoo"
    code += "; [zoo.entry(n) for n in zoo.names()]; assert not {'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
