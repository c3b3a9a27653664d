"""The same weights on both sides: logits, single steps, padding and the way back, for every family and its awkward cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archcompass.blocks.hf import read_config, to_config
from archcompass.blocks.hf.checkpoint import save_pretrained
from archcompass.blocks.hf.compare import differences
from archcompass.blocks.hf.configuration import model_types

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MLP = {"intermediate_size": 40}
MHA = {"num_key_value_heads": 4}
LATENT = MHA | {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
GROUPS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
DEEPSEEK = BASE | MLP | LATENT | GROUPS | {"n_routed_experts": 8, "first_k_dense_replace": 1, "q_lora_rank": 20}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
GATED_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "chunk_size": 16}
NEMOTRON = BASE | {
    "num_hidden_layers": None,
    "intermediate_size": 48,
    "head_dim": 12,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
}
ZAMBA2 = (
    BASE
    | MLP
    | MHA
    | {"num_hidden_layers": 4, "n_mamba_heads": 8, "mamba_d_state": 16, "chunk_size": 16, "adapter_rank": 4}
)
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MINIMAX_M2 = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = BASE | {
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "attention_chunk_size": 16,
    "floor_scale": 4,
    "num_hidden_layers": 4,
}
KIMI = BASE | MLP | LATENT | GROUPS | {"num_experts": 8, "q_lora_rank": None, "head_dim": 8, "num_hidden_layers": 4}


def rope(**parameters: Any) -> dict[str, Any]:
    """A llama whose frequencies are stretched in one of the ways there are."""
    return BASE | MLP | {"head_dim": 8, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE | MLP | {"rms_norm_eps": 1e-5}),
    "llama, one key head, biases, tied": (
        "LlamaConfig",
        BASE
        | MLP
        | {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama, llama3 rope": (
        "LlamaConfig",
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama, linear rope": ("LlamaConfig", rope(rope_type="linear", factor=4.0)),
    "llama, yarn": ("LlamaConfig", BASE | MLP | {"rope_parameters": YARN}),
    "llama, longrope": (
        "LlamaConfig",
        rope(
            rope_type="longrope",
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            original_max_position_embeddings=12,
            factor=2.0,
        ),
    ),
    "mistral, a window": ("MistralConfig", BASE | MLP | {"sliding_window": 8, "head_dim": 12}),
    "mistral, no window": ("MistralConfig", BASE | MLP | {"sliding_window": None, "hidden_act": "gelu"}),
    "mixtral": ("MixtralConfig", BASE | MLP | {"num_local_experts": 4}),
    "mixtral, a window, one expert": (
        "MixtralConfig",
        BASE | MLP | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 8, "head_dim": 12},
    ),
    "qwen3": ("Qwen3Config", BASE | MLP | {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3, upper layers windowed": (
        "Qwen3Config",
        BASE
        | MLP
        | {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", BASE | MLP | QWEN_EXPERTS | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe, dense between": (
        "Qwen3MoeConfig",
        BASE | MLP | QWEN_EXPERTS | {"head_dim": 16, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    ),
    "mellum": ("MellumConfig", BASE | MLP | QWEN_EXPERTS | {"head_dim": 12}),
    "mellum, windows, two ropes, dense first": (
        "MellumConfig",
        BASE
        | MLP
        | QWEN_EXPERTS
        | {
            "head_dim": 12,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "attention_bias": True,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_next, dense alone": (
        "Qwen3NextConfig",
        BASE
        | MLP
        | QWEN_EXPERTS
        | GATED_DELTA
        | {"head_dim": 16, "num_hidden_layers": 4, "mlp_only_layers": [0, 1, 2, 3]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        BASE
        | MLP
        | QWEN_EXPERTS
        | GATED_DELTA
        | {"num_hidden_layers": 4, "head_dim": 16, "shared_expert_intermediate_size": 20},
    ),
    "qwen3_next, dense first, one key head": (
        "Qwen3NextConfig",
        BASE
        | MLP
        | QWEN_EXPERTS
        | GATED_DELTA
        | {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "mlp_only_layers": [0],
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "deepseek_v3, yarn, queries at once": (
        "DeepseekV3Config",
        DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3, biases, halves": (
        "DeepseekV3Config",
        DEEPSEEK | {"attention_bias": True, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        DEEPSEEK | {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8},
    ),
    "deepseek_v32, every key": (
        "DeepseekV32Config",
        DEEPSEEK | {"index_n_heads": 4, "index_head_dim": 8, "index_topk": 64, "first_k_dense_replace": 2},
    ),
    "llama4_text": ("Llama4TextConfig", LLAMA4),
    "llama4_text, dense between, no norm": (
        "Llama4TextConfig",
        LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_key_value_heads": 1, "head_dim": 12},
    ),
    "gpt_oss": ("GptOssConfig", BASE | MLP | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8}),
    "gpt_oss, no biases in attention": (
        "GptOssConfig",
        BASE
        | MLP
        | {
            "head_dim": 12,
            "num_key_value_heads": 1,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "minimax": ("MiniMaxConfig", BASE | MLP | {"head_dim": 16, "num_local_experts": 4, "block_size": 16}),
    "minimax, all factors": (
        "MiniMaxConfig",
        BASE
        | MLP
        | {
            "num_local_experts": 3,
            "block_size": 8,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "full_attn_alpha_factor": 1.5,
            "full_attn_beta_factor": 0.7,
            "linear_attn_alpha_factor": 2.0,
            "linear_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 3.5,
            "mlp_beta_factor": 0.9,
        },
    ),
    "minimax_m2": ("MiniMaxM2Config", BASE | MLP | MINIMAX_M2 | {"head_dim": 16, "rotary_dim": 8}),
    "minimax_m2, one key head": (
        "MiniMaxM2Config",
        BASE | MLP | {"head_dim": 12, "num_local_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 1},
    ),
    "mamba": ("MambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "mamba, biases, untied": (
        "MambaConfig",
        {
            "vocab_size": 97,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": False,
        },
    ),
    "mamba2": ("Mamba2Config", MAMBA2 | {"num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "mamba2, biases, tied, bounded steps": (
        "Mamba2Config",
        MAMBA2
        | {
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
            "time_step_limit": (0.01, 0.2),
        },
    ),
    "nemotron_h": ("NemotronHConfig", NEMOTRON | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}),
    "nemotron_h, experts, one key head, biases": (
        "NemotronHConfig",
        NEMOTRON
        | {
            "layers_block_type": ["moe", "mamba", "attention", "moe", "mlp"],
            "num_key_value_heads": 1,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 20,
            "moe_latent_size": 16,
            "use_bias": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "jamba": (
        "JambaConfig",
        BASE
        | MLP
        | {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "jamba, biases, experts everywhere": (
        "JambaConfig",
        BASE
        | MLP
        | {
            "num_experts": 3,
            "num_key_value_heads": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_dt_rank": 5,
            "tie_word_embeddings": True,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaConfig", BASE | MLP | SSM | {"attn_layer_indices": [1]}),
    "bamba, biases, groups": (
        "BambaConfig",
        BASE
        | MLP
        | SSM
        | {
            "attn_layer_indices": [0, 2],
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        BASE
        | MLP
        | SSM
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid, dense, rope": (
        "GraniteMoeHybridConfig",
        BASE
        | MLP
        | SSM
        | {
            "layer_types": ["attention", "mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "num_key_value_heads": 1,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        BASE | MLP | {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 10, "sliding_window_pattern": 2},
    ),
    "gemma3_text, stretched, capped": (
        "Gemma3TextConfig",
        BASE
        | MLP
        | {
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 2.0,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        BASE | MLP | GROUPS | {"n_routed_experts": 8, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    ),
    "glm4_moe, no norm, two shared experts": (
        "Glm4MoeConfig",
        BASE
        | MLP
        | GROUPS
        | {
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "head_dim": 24,
            "first_k_dense_replace": 2,
            "num_key_value_heads": 1,
            "routed_scaling_factor": 2.5,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        KIMI
        | {
            "linear_attn_config": {
                "full_attn_layers": [2, 4],
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 8,
                "short_conv_kernel_size": 4,
            }
        },
    ),
    "kimi_linear, dense first": (
        "KimiLinearConfig",
        KIMI
        | {
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "first_k_dense_replace": 2,
            "linear_num_heads": 2,
            "linear_head_dim": 12,
            "linear_conv_kernel_dim": 3,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        BASE | MLP | GATED_DELTA | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "olmo_hybrid, no positions": (
        "OlmoHybridConfig",
        BASE
        | MLP
        | GATED_DELTA
        | {
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "rope_parameters": {"rope_theta": None, "rope_type": "default"},
            "num_key_value_heads": 1,
            "linear_allow_neg_eigval": False,
            "attention_bias": True,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        BASE
        | MLP
        | {
            "head_dim": 12,
            "mamba_d_ssm": 48,
            "mamba_n_heads": 6,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "embedding_multiplier": 2.0,
            "lm_head_multiplier": 0.5,
            "key_multiplier": 0.6,
            "attention_in_multiplier": 1.3,
            "attention_out_multiplier": 0.8,
            "ssm_in_multiplier": 0.7,
            "ssm_out_multiplier": 1.2,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
            "mlp_multipliers": [0.8, 1.4],
        },
    ),
    "falcon_h1, norm after the gate, biases": (
        "FalconH1Config",
        BASE
        | MLP
        | SSM
        | {
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1, norm before the gate": (
        "FalconH1Config",
        BASE | MLP | SSM | {"mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
    ),
    "zamba2": (
        "Zamba2Config",
        ZAMBA2 | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "use_mem_rope": True},
    ),
    "zamba2, two shared blocks, biases": (
        "Zamba2Config",
        ZAMBA2
        | {
            "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid"],
            "num_hidden_layers": 6,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "add_bias_linear": True,
            "mamba_ngroups": 2,
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 64, "rescale_every": 2},
    ),
    "rwkv, wider attention": (
        "RwkvConfig",
        {
            "vocab_size": 97,
            "hidden_size": 24,
            "attention_hidden_size": 24,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "context_length": 64,
        },
    ),
}

WITHOUT_A_CLASS = {"retnet", "rwkv6", "rwkv7", "minimax_m1", "llama4", "kimi_k2"}
"""Model types that transformers cannot make alone: the authors' code stands in, or the class of another type."""

TOLERANCE = 1e-4
"""Of the largest logit, in float32. No family needs more."""


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request: pytest.FixtureRequest, make_pair: Callable[..., Any]) -> Any:
    return make_pair(*CASES[request.param])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_every_family_is_held_against_transformers() -> None:
    tried = {name.split(",")[0] for name in CASES}
    assert set(model_types()) - tried == WITHOUT_A_CLASS


def test_logits_and_parameters_are_those_of_transformers(pair: Any) -> None:
    assert distance(pair.our_logits(pair.ids), pair.their_logits(pair.ids)) < TOLERANCE
    theirs = sum(parameter.numel() for parameter in pair.theirs.parameters())
    assert sum(parameter.numel() for parameter in pair.ours.parameters()) == theirs
    assert pair.ours.spec.parameters().total == theirs


def test_single_steps_after_a_prompt_are_one_forward_of_either_side(pair: Any) -> None:
    ids, prompt = pair.ids[:, :31], 23
    with torch.inference_mode():
        out = pair.ours(ids[:, :prompt])
        steps = [out.logits[:, -1:]]
        for at in range(prompt, ids.shape[1]):
            out = pair.ours(ids[:, at : at + 1], out.state)
            steps.append(out.logits)
    stepped = torch.cat(steps, dim=1)
    assert distance(stepped, pair.our_logits(ids)[:, prompt - 1 :]) < TOLERANCE
    assert distance(stepped, pair.their_logits(ids)[:, prompt - 1 :]) < TOLERANCE


def test_left_padding_gives_the_rows_of_single_sequences(pair: Any) -> None:
    ids, padded = pair.ids[:, :25], 7
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    with torch.inference_mode():
        out = pair.ours(ids[:, :-1], attention_mask=mask[:, :-1])
        last = pair.ours(ids[:, -1:], out.state).logits
    together = torch.cat([out.logits, last], dim=1)
    assert distance(together[:1], pair.our_logits(ids[:1])) < TOLERANCE
    assert distance(together[1:, padded:], pair.our_logits(ids[1:, padded:])) < TOLERANCE


def test_an_exported_folder_opens_in_transformers(pair: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_pretrained(pair.ours, tmp_path)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is type(pair.theirs)
    assert not [key for key in report["missing_keys"] if "decay" not in key and "slope" not in key]
    assert not report["unexpected_keys"]
    assert opened.num_parameters() == pair.theirs.num_parameters()
    ids = pair.ids[:1, :20]
    assert distance(pair.their_logits(ids, opened.eval()), pair.their_logits(ids)) < 1e-5


def test_a_configuration_comes_back_the_same(pair: Any) -> None:
    spec = pair.ours.spec
    config = to_config(spec)
    assert config["model_type"] == pair.theirs.config.model_type
    assert differences(spec, read_config(config)) == []
