"""Configurations: what is understood, what is refused and by which name, and which family says a model of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from archcompass.blocks import zoo
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf import load_config, read_config, to_config
from archcompass.blocks.hf.compare import differences
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import ConversionError, FileFormatError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OURS = ModelSpec(
    hidden_size=64,
    vocab_size=100,
    blocks={
        "look": Attention(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        "think": GatedMLP(intermediate_size=96),
    },
    layers="2*(look think)",
)


def changed(**keys: Any) -> dict[str, Any]:
    return LLAMA | keys


def test_an_unknown_field_is_named_and_not_dropped() -> None:
    with pytest.raises(ConversionError, match=r"use_flux_capacitor is 'True'.*will not drop it"):
        read_config(changed(use_flux_capacitor=True))


def test_an_unknown_field_that_says_nothing_passes() -> None:
    assert read_config(changed(use_flux_capacitor=None)) == read_config(LLAMA)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' has no adapter"),
        ({"model_type": "lama"}, "nearest: llama"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'.*a whole number"),
        ({"hidden_size": True}, "hidden_size is 'True'.*a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'.*a number"),
        ({"attention_bias": 1}, "attention_bias is '1'.*true or false"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling: rope_type is 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "rope_scaling: wobble"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'.*a mapping"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_said_is_refused_by_field(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read_config(changed(**keys))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    config = changed(auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).num_hidden_layers == 2


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "nul", "\0\0", '{"model_type": '], ids=repr)
def test_a_file_that_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_config(tmp_path)


def test_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    config = to_config(zoo.published("mamba2-130m"))
    config["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert differences(zoo.published("mamba2-130m"), load_config(tmp_path)) == []


def test_a_model_of_our_own_becomes_the_first_family_that_can_say_it() -> None:
    config = to_config(OURS)
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert differences(OURS, read_config(config)) == []


def test_a_model_that_no_family_can_say_names_what_is_lost() -> None:
    odd = OURS.model_copy(update={"logit_soft_cap": 30.0})
    with pytest.raises(ConversionError, match=r"no Hugging Face family.*logit_soft_cap is 30\.0, there None"):
        to_config(odd)


def test_a_family_asked_for_by_name_says_what_it_would_lose() -> None:
    sinks = OURS.model_copy(
        update={"blocks": {**OURS.blocks, "look": OURS.blocks["look"].model_copy(update={"sinks": True})}}
    )
    with pytest.raises(ConversionError, match=r"llama cannot say this model: blocks\.look\.sinks is True, there False"):
        to_config(sinks, "llama")


@pytest.mark.parametrize("name", zoo.names())
def test_every_published_model_survives_the_way_out_and_back(name: str) -> None:
    spec = zoo.published(name)
    back = read_config(json.loads(json.dumps(to_config(spec))))
    assert differences(spec, back) == []
    assert back.parameters() == spec.parameters()


def test_old_and_new_spellings_of_the_rope_are_one() -> None:
    old = changed(rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 4.0})
    new = changed(rope_parameters={"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0})
    assert read_config(old) == read_config(new)


def test_two_spellings_of_one_key_must_agree() -> None:
    config = to_config(zoo.published("qwen3-30b-a3b"))
    with pytest.raises(ConversionError, match=r"num_local_experts is '4'.*same as num_experts, which is 128"):
        read_config(config | {"num_local_experts": 4})


def test_reading_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from archcompass.blocks import zoo; from archcompass.blocks.hf import to_config"
    code += "; [to_config(zoo.published(n)) for n in ('llama-3.1-8b', 'zamba2-7b')]"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
