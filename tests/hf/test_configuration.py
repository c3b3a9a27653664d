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


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama-3.1-8b", {"pretraining_tp": 1, "torch_dtype": "bfloat16", "temperature": 1.0, "top_k": 50}),
        ("mamba-130m", {"d_model": 768, "n_layer": 24, "d_inner": 1536, "rms_norm": True, "ssm_cfg": {}}),
        (
            "mamba2-130m",
            {"norm_before_gate": False, "rms_norm": True, "time_step_rank": "auto", "residual_in_fp32": True},
        ),
        ("jamba-v0.1", {"mamba_inner_layernorms": True, "calc_logits_for_entire_prompt": False, "n_ctx": None}),
        ("nemotron-h-8b", {"attention_head_dim": 128, "norm_eps": 1e-5, "mamba_dt_max": 0.1, "rope_theta": 10000}),
        ("falcon-h1-34b", {"mlp_expansion_factor": 8, "mamba_use_mlp": True, "time_step_floor": 1e-4}),
        ("bamba-9b", {"attn_rotary_emb": 64, "num_logits_to_keep": 1, "mamba_chunk_size": 256}),
        ("granite-4.0-h-small", {"init_method": "mup", "normalization_function": "rmsnorm"}),
        ("minimax-m2", {"use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_mtp": True}),
        ("gpt-oss-20b", {"experts_per_token": 4, "initial_context_length": 4096}),
        ("llama-4-scout-17b-16e", {"attn_temperature_tuning": 4, "for_llm_compressor": False}),
        ("deepseek-v3", {"aux_loss_alpha": 0.001, "ep_size": 1, "seq_aux": True, "auto_map": {"AutoConfig": "x.Y"}}),
        ("kimi-linear-48b-a3b", {"moe_router_activation_func": "sigmoid", "use_grouped_topk": True}),
        ("gemma-3-27b-text", {"cache_implementation": "hybrid", "sliding_window_pattern": 6}),
        ("rwkv-4-169m-pile", {"rescale_every": 6}),
    ],
)
def test_keys_of_published_files_change_nothing(name: str, keys: dict[str, Any]) -> None:
    spec = zoo.published(name)
    assert differences(spec, read_config(to_config(spec) | keys)) == []


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("mamba-130m", {"d_model": 512}, "d_model is '512'.*768"),
        ("mamba2-130m", {"rms_norm": False}, "rms_norm is 'False'.*True"),
        ("jamba-v0.1", {"sliding_window": 4096}, "sliding_window is '4096'"),
        ("bamba-9b", {"attn_rotary_emb": 128}, "attn_rotary_emb is '128'.*64"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'.*'sigmoid'"),
        ("deepseek-v3", {"num_key_value_heads": 8}, "num_key_value_heads is '8'.*128"),
        ("falcon-h1-34b", {"projectors_bias": True}, "projectors_bias is 'True'.*False"),
        ("zamba2-7b", {"use_long_context": True}, "use_long_context is 'True'"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
        ("gemma-3-27b-text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is 'True'"),
        ("nemotron-h-8b", {"hybrid_override_pattern": "M-X"}, "hybrid_override_pattern is 'M-X'"),
        ("nemotron-h-8b", {"hybrid_override_pattern": 3}, "hybrid_override_pattern is '3'"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types is 'a list of 1'.*one of 24"),
        ("gemma-3-1b", {"layer_types": ["spiral"] * 26}, "layer_types is 'spiral'.*sliding_attention"),
        ("granite-4.0-h-small", {"num_hidden_layers": 3}, "layer_types is 'a list of 40'.*one of 3"),
        ("bamba-9b", {"layers_block_type": ["mamba"]}, "layers_block_type is 'a list of 1'.*one of 32"),
        ("zamba2-7b", {"layers_block_type": ["moe"] * 81}, "layers_block_type is 'moe'"),
        ("jamba-v0.1", {"layers_block_type": ["mamba"] * 32}, "layers_block_type is 'another list'.*attn_layer_period"),
        ("jamba-v0.1", {"layers_num_experts": [16] * 32}, "layers_num_experts is"),
        ("llama-4-scout-17b-16e", {"no_rope_layers": [1, 0]}, "no_rope_layers is 'a list of 2'.*one of 48"),
        ("gpt-oss-20b", {"sliding_window": 0}, "sliding_window is '0'.*at least 1"),
        ("gemma-3-1b", {"final_logit_softcapping": -1}, "logit_soft_cap is -1"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace is '-1'.*at least 0"),
        ("qwen3-30b-a3b", {"hidden_act": ["silu"]}, "hidden_act is .*gelu"),
        ("qwen3-30b-a3b", {"num_attention_heads": 0}, "num_attention_heads is '0'.*at least 1"),
        ("mamba-130m", {"intermediate_size": 1000}, "intermediate_size is '1000'.*1536"),
        ("mamba-130m", {"time_step_rank": 1.5}, "time_step_rank is '1.5'.*a whole number"),
        ("falcon-h1-34b", {"mlp_multipliers": [1.0]}, "mlp_multipliers is .*a list of 2"),
        ("kimi-linear-48b-a3b", {"num_experts": 1.5}, "^num_experts is '1.5'"),
        ("kimi-linear-48b-a3b", {"linear_attn_config": {"warp": 9}}, "linear_attn_config is 'warp'.*num_heads"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling is 'rope_type: spiral'.*'llama3'"),
    ],
)
def test_a_key_that_asks_for_another_model_is_refused(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read_config(to_config(zoo.published(name)) | keys)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "kimi-linear-48b-a3b"])
def test_a_number_of_layers_beyond_all_bounds_takes_no_memory(name: str) -> None:
    config = to_config(zoo.published(name)) | {"first_k_dense_replace": 10**12, "mlp_layer_types": None}
    assert read_config(config).parameters().total != zoo.published(name).parameters().total


def test_kimi_k2_under_its_own_name_is_written_as_deepseek() -> None:
    config = to_config(zoo.published("kimi-k2"))
    spec = read_config(config | {"model_type": "kimi_k2", "rope_interleave": None})
    assert differences(zoo.published("kimi-k2"), spec) == []
    assert to_config(spec)["model_type"] == "deepseek_v3"


def test_llama_4_with_its_tower_is_its_text_part() -> None:
    text = to_config(zoo.published("llama-4-scout-17b-16e"))
    whole = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 1408}}
    spec = read_config(whole)
    assert differences(zoo.published("llama-4-scout-17b-16e"), spec) == []
    assert to_config(spec)["model_type"] == "llama4_text"
    with pytest.raises(ConversionError, match="vision tower"):
        to_config(spec, "llama4")


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
