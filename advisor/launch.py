"""Launch recipes as text: what to type to serve or train a design with a tool of the field, in the versions named here.

A recipe says what the tool really has. What it cannot express is refused or said beside the command.
"""

from __future__ import annotations

import shlex
from typing import Any

from archcompass.advisor.units import say_bytes
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import ConversionError
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.training.plan import Plan

VLLM = "0.14"
"""The first version the recipe is for: its registry lists `VLLM_ARCHITECTURES`, its `serve` has the flags used here. So does
0.33; both were read (vllm/model_executor/models/registry.py and vllm/engine/arg_utils.py of the published wheels)."""

VLLM_ARCHITECTURES = frozenset(
    "BambaForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM FalconH1ForCausalLM Gemma3ForCausalLM Glm4MoeForCausalLM "
    "GptOssForCausalLM GraniteMoeHybridForCausalLM JambaForCausalLM KimiLinearForCausalLM Llama4ForCausalLM "
    "Llama4ForConditionalGeneration LlamaForCausalLM Mamba2ForCausalLM MambaForCausalLM MiniMaxForCausalLM "
    "MiniMaxM1ForCausalLM MiniMaxM2ForCausalLM MistralForCausalLM MixtralForCausalLM NemotronHForCausalLM "
    "Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Zamba2ForCausalLM".split()
)
"""Those of ours that vLLM serves."""

VLLM_NEWER = {"MellumForCausalLM": "0.33"}
"""Those that it serves only in later versions: one whose registry lists them."""

SHARED_HEADS = (
    "num_attention_heads",
    "num_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mamba_num_heads",
    "mamba_n_heads",
    "n_mamba_heads",
)
"""Fields that vLLM divides evenly over cards."""

HEADER = '#!/bin/sh\nset -eu\ncd "$(dirname "$0")"\n'


def vllm(
    config: dict[str, Any],
    *,
    has_weights: bool,
    context: int | None = None,
    sequences: int | None = None,
    hardware: Hardware | None = None,
) -> str:
    """A shell script beside config.json that serves it.

    Args:
        config: the configuration that stands beside it.
        has_weights: whether safetensors stand there as well; without them vLLM makes up numbers, good for measuring only.
        context: tokens of one sequence at most; None leaves the configuration's own.
        sequences: sequences at once at most; None leaves vLLM's default.
        hardware: the cards it is spread over.

    Raises:
        ConversionError: vLLM has no such architecture, cannot spread its heads over so many cards, or would refuse the context;
            names the field.
    """
    architecture = config["architectures"][0]
    if architecture not in VLLM_ARCHITECTURES | VLLM_NEWER.keys():
        raise ConversionError(f"architectures is {architecture!r}, which vLLM {VLLM} does not list")
    cards = 1 if hardware is None else hardware.count
    _check_heads(config, cards)
    _check_context(config, context)
    flags = ["--dtype bfloat16", "--skip-tokenizer-init"]
    flags += [] if has_weights else ["--load-format dummy"]
    flags += [f"--max-model-len {context}"] if context else []
    flags += [f"--max-num-seqs {sequences}"] if sequences else []
    flags += [f"--tensor-parallel-size {cards}"] if cards > 1 else []
    said = ["# A design has no tokenizer: requests and answers are token ids. With one in this folder, drop that flag."]
    if not has_weights:
        said.append("# No weights here: vLLM fills in random ones, good for speed and memory alone.")
    said.append(
        "# Weights in bfloat16; add --quantization fp8 for half the memory. For 4 bits quantise them beforehand."
    )
    return _script(f"vLLM {VLLM_NEWER.get(architecture, VLLM)} and later", said, "vllm serve .", flags)


def _check_heads(config: dict[str, Any], cards: int) -> None:
    for field in SHARED_HEADS:
        heads = config.get(field)
        if heads and heads % cards:
            nearest = max(n for n in range(1, cards + 1) if heads % n == 0)
            raise ConversionError(
                f"{field} is {heads}; vLLM spreads heads evenly, and {cards} cards do not divide them; nearest: {nearest}"
            )


def _check_context(config: dict[str, Any], context: int | None) -> None:
    longest = config.get("max_position_embeddings")
    if context and longest and context > longest:
        raise ConversionError(
            f"context is {context:,}; max_position_embeddings is {longest:,}, and vLLM serves no more; nearest: {longest:,}"
        )


def torchrun(spec: ModelSpec, plan: Plan, *, data: str, hardware: Hardware | None = None) -> str:
    """A shell script beside model.yaml that trains it with `archcompass train` on every card of one machine.

    Args:
        spec: the model.
        plan: how; its batch is shared among the cards.
        data: the text's path, as seen from the folder.
        hardware: the cards.

    Raises:
        ConversionError: the model does not fit one card; training here keeps all of it on each.
    """
    cards = 1 if hardware is None else hardware.count
    total = spec.parameters().total
    needed = total * plan.bytes_per_parameter
    if hardware is not None and needed > hardware.memory_bytes:
        raise ConversionError(
            f"parameters is {total:,}: weights, gradients and moments take {say_bytes(needed)}, and training here keeps "
            f"all of them on each card of {say_bytes(hardware.memory_bytes)}; sharding (FSDP) is not offered"
        )
    if plan.batch % cards:
        raise ConversionError(
            f"batch ({plan.batch}) must divide over {cards} cards; nearest: {-(-plan.batch // cards) * cards}"
        )
    flags = [
        f"--data {shlex.quote(data)}",
        f"--steps {plan.steps}",
        f"--batch {plan.batch}",
        f"--sequence {plan.sequence}",
        f"--learning-rate {plan.learning_rate:g}",
        "--device cuda",
        f"--precision {plan.precision}",
        "--out run",
        "--resume",
    ]
    said = [
        f"# Each card keeps the whole model: {say_bytes(needed)} of weights, gradients and moments, then activations.",
        "# Started again after a stop, it goes on from the last checkpoint in run/.",
    ]
    command = f"torchrun --standalone --nproc-per-node {cards} -m archcompass train model.yaml"
    return _script("torch 2.9 and later, archcompass in the same environment", said, command, flags)


def _script(versions: str, said: list[str], command: str, flags: list[str]) -> str:
    lines = [HEADER + f"# For {versions}.", *said, " \\\n  ".join([command, *flags])]
    return "\n".join(lines) + "\n"
