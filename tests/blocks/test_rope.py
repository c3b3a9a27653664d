"""Rotary positions: every stretched form against the reference implementation, and what may not be said."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from archcompass.blocks.rope import Rope, yarn_scale
from archcompass.blocks.rotary import table, turn
from archcompass.blocks.runtime import Context
from archcompass.errors import SpecError

LONG = tuple(1.0 + 0.7 * pair for pair in range(16))
SHORT = tuple(1.0 + 0.01 * pair for pair in range(16))

FORMS: list[dict[str, Any]] = [
    {"theta": 5e5},
    {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "theta": 1.5e5, "truncate": False},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "theta": 5e5},
    {"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 64}
    | {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "theta": 5e5},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}
    | {"short_factor": SHORT, "long_factor": LONG},
]


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.get("rope_type", "default"))
def test_frequencies_are_those_of_the_reference(form: dict[str, Any], length: int) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = Rope.model_validate(form)
    said = {("rope_theta" if key == "theta" else key): value for key, value in form.items()}
    said = {"rope_type": "default", "rope_theta": 10000.0} | said
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        rope_parameters={key: list(value) if isinstance(value, tuple) else value for key, value in said.items()},
    )
    if rope.rope_type == "default":
        expected, amplitude = 5e5 ** (-torch.arange(0, 32, 2) / 32), 1.0
    else:
        expected, amplitude = ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"), seq_len=length)
    ours = torch.tensor(rope.inverse_frequencies(32, length))
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=0)
    assert rope.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved: bool) -> None:
    rope = Rope(interleaved=interleaved, partial_rotary_factor=0.5)
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = [
        (turn(query, rope, Context(past=past + 5)) * turn(key, rope, Context(past=past))).sum() for past in (0, 100)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    turned = turn(query, rope, Context(past=3))
    assert torch.equal(turned[..., 8:], query[..., 8:])
    torch.testing.assert_close(turned.norm(), query.norm())


def test_longrope_looks_at_the_longest_row_without_its_padding() -> None:
    rope = Rope.model_validate(FORMS[-1])
    x = torch.zeros(2, 70, 1, 32)
    short = table(rope, 32, Context(padding=torch.tensor([10, 20])), 70, x)[0][0, -1]
    long = table(rope, 32, Context(padding=torch.tensor([5, 20])), 70, x)[0][0, -1]
    expected = torch.tensor(59.0) * torch.tensor(rope.inverse_frequencies(32, 60))
    torch.testing.assert_close(short, expected.cos() * rope.amplitude)
    torch.testing.assert_close(
        long, (64.0 * torch.tensor(rope.inverse_frequencies(32, 65))).cos() * rope.amplitude, rtol=1e-4, atol=1e-5
    )


def test_amplitude_of_deepseek_is_one_and_of_gpt_oss_is_not() -> None:
    said = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    assert Rope.model_validate(said | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}).amplitude == 1.0
    assert Rope.model_validate(said | {"factor": 32.0}).amplitude == pytest.approx(1.3466, abs=1e-4)
    assert yarn_scale(1.0) == 1.0


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"factor": 2.0}, "factor means nothing to rope_type 'default'"),
        ({"rope_type": "llama3", "beta_fast": 3.0} | FORMS[6] | {"beta_fast": 3.0}, "beta_fast means nothing"),
        (FORMS[-1] | {"short_factor": (1.0,)}, "short_factor has 1 entries and long_factor 16"),
        ({"rope_type": "ntk"}, "rope_type"),
        ({"theta": 0}, "theta"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_is_refused(form: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Rope.model_validate(form)


def test_equal_ropes_share_a_table_and_others_do_not() -> None:
    context, x = Context(), torch.zeros(1, 3, 1, 8)
    first = table(Rope(), 8, context, 3, x)
    assert table(Rope(), 8, context, 3, x)[0] is first[0]
    assert table(Rope(theta=100.0), 8, context, 3, x)[0] is not first[0]
    copy = Rope().model_copy(update={"interleaved": True})
    assert hash(Rope()) == hash(Rope())
    assert copy != Rope()


def test_channels_turn_in_pairs() -> None:
    with pytest.raises(SpecError, match="must be even"):
        Rope(partial_rotary_factor=0.5).rotary_dim(10)
    with pytest.raises(SpecError, match="16 entries"):
        Rope.model_validate(FORMS[-1]).rotary_dim(64)
