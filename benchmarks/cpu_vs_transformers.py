"""Whole models of about a hundred million parameters on this CPU, ours against transformers, with the same weights.

    python benchmarks/cpu_vs_transformers.py [--models llama mamba2 ...] [--dtypes float32 bfloat16] [--threads 1 2]
        [--cases "prefill 512" "prefill 2048" "decode 64"] [--rounds 3] [--seconds 1.5] [--output FILE.json]
    python benchmarks/cpu_vs_transformers.py --table docs/kernels.md     # measures nothing, writes what is kept as its table

Prefill is a prompt of 512 or 2048 tokens with the logits of the last position only; decode is 64 tokens, one at a time,
after 512. Both sides run in this process, turn by turn, so that a busy machine slows them alike; medians of wall time and
of processor time are kept. With one thread the ratios are of processor time, which other programs disturb least. A side
that has used up its seconds runs no further round, and the number of rounds is kept. Everything takes about nine minutes
with one thread and seven with two. A run replaces the kept rows of what it measured, and all of them where the machine or a
version has changed. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from archcompass.blocks.hf.checkpoint import load_pretrained
from archcompass.profiles.cpu import this_cpu

DECODED, BEFORE = 64, 512
WARM_UP = 4  # tokens decoded before it counts
CASES = ("prefill 512", "prefill 2048", f"decode {DECODED}")
KEPT = Path(__file__).parent / "results" / "cpu_vs_transformers.json"
BASE = {"vocab_size": 32000, "hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 8192}
DENSE = BASE | {"intermediate_size": 1536, "num_key_value_heads": 4}
EXPERTS = DENSE | {
    "num_hidden_layers": 12,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
SSM = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 256}
LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "time_step_rank": 48},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": 50288,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "state_size": 128,
            "head_dim": 64,
            "num_heads": 24,
            "n_groups": 1,
            "tie_word_embeddings": True,
        },
    ),
    "jamba": (
        "JambaConfig",
        DENSE
        | {
            "num_hidden_layers": 8,
            "num_experts": 8,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_dt_rank": 32,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 64, "num_experts": 16}),
    "qwen3_next": (
        "Qwen3NextConfig",
        EXPERTS
        | LINEAR
        | {"num_key_value_heads": 2, "head_dim": 64, "num_experts": 16, "shared_expert_intermediate_size": 256},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        EXPERTS
        | {
            "num_key_value_heads": 8,
            "q_lora_rank": 256,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        BASE
        | {
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_local_experts": 8,
            "layer_types": ["linear_attention"] * 7 + ["full_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        DENSE | {"num_hidden_layers": 12, "head_dim": 64, "intermediate_size": 256, "num_local_experts": 16},
    ),
    "gemma3_text": ("Gemma3TextConfig", DENSE | {"num_hidden_layers": 18, "head_dim": 64, "sliding_window": 512}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        DENSE
        | SSM
        | {
            "num_hidden_layers": 12,
            "layer_types": (["mamba"] * 5 + ["attention"]) * 2,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "intermediate_size": 256,
            "shared_intermediate_size": 512,
        },
    ),
    "falcon_h1": ("FalconH1Config", DENSE | SSM | {"num_hidden_layers": 16, "mamba_d_ssm": 1024}),
    "olmo_hybrid": ("OlmoHybridConfig", DENSE | LINEAR | {"num_hidden_layers": 16}),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "context_length": 8192},
    ),
}

Run = Callable[[int], object]


class Theirs:
    """The transformers model: prompts, and single tokens after one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.memory = next(name for name in ("past_key_values", "cache_params", "state") if name in accepted)
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.positions = "position_ids" in accepted

    def prompt(self, ids: torch.Tensor) -> Any:
        """One forward over the prompt; the cache it leaves."""
        return getattr(self.model(ids, use_cache=True, **self.keep), self.memory)

    def decode(self, memory: Any, tokens: torch.Tensor) -> Any:
        """The tokens one by one after `memory`."""
        out = None
        for at in range(tokens.shape[1]):
            options: dict[str, Any] = {self.memory: memory, "use_cache": True}
            if self.positions:
                options["position_ids"] = torch.tensor([[BEFORE + at]])
            out = self.model(tokens[:, at : at + 1], **options)
            memory = getattr(out, self.memory)
        return out


def pair(name: str, dtype: torch.dtype, folder: Path) -> tuple[Any, Any]:
    """The same random weights on both sides."""
    cls, arguments = MODELS[name]
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, cls)(**{**tokens, **arguments})
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    theirs.save_pretrained(folder)
    return Theirs(theirs), load_pretrained(folder).for_decoding()


def candidates(theirs: Any, ours: Any) -> dict[str, dict[str, Run]]:
    """What is timed, for each side: a run takes how many tokens it decodes, which prompts do not read."""
    vocabulary = ours.spec.vocab_size
    ids = torch.arange(2048)[None] * 7919 % vocabulary
    following = torch.arange(DECODED)[None] * 104729 % vocabulary
    memory, state = theirs.prompt(ids[:, :BEFORE]), ours(ids[:, :BEFORE], logits_to_keep=1).state

    def our_decode(tokens: int) -> None:
        kept = state.copy()
        for at in range(tokens):
            kept = ours(following[:, at : at + 1], kept).state

    cases: dict[str, dict[str, Run]] = {
        f"prefill {length}": {
            "ours": lambda _, length=length: ours(ids[:, :length], logits_to_keep=1),
            "theirs": lambda _, length=length: theirs.prompt(ids[:, :length]),
        }
        for length in (512, 2048)
    }
    cases[f"decode {DECODED}"] = {
        "ours": our_decode,
        "theirs": lambda tokens: theirs.decode(copy.deepcopy(memory), following[:, :tokens]),
    }
    return cases


def measured(case: str, runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Median wall and processor milliseconds of each side, in turns. Prompts are warm from the one before decoding."""
    if case == CASES[-1]:
        for run in runs.values():
            run(WARM_UP)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if sum(wall for wall, _ in taken[name]) > seconds:
                continue
            wall, processor = time.perf_counter(), time.process_time()
            run(DECODED)
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: _medians(times) for name, times in taken.items()}


def _medians(times: list[tuple[float, float]]) -> dict[str, float]:
    wall, processor = (round(1000 * median(column), 2) for column in zip(*times, strict=True))
    return {"wall_ms": wall, "processor_ms": processor, "rounds": len(times)}


def wanted(name: str, case: str) -> float:
    """The least ratio this project asks for."""
    if case.startswith("decode"):
        return 1.5
    return 4.0 if name in ("mamba", "mamba2") else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=Path, default=KEPT)
    parser.add_argument("--table", type=Path, help="write the kept rows as the table of this page, and measure nothing")
    options = parser.parse_args()
    if options.table is not None:
        options.table.write_text(tabled(options.table.read_text(), json.loads(options.output.read_text())["rows"]))
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                rows += _compare(name, dtype, Path(folder), options)
            _write(options.output, rows, options)


def _compare(name: str, dtype: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    theirs, ours = pair(name, getattr(torch, dtype), folder)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = "processor_ms" if threads == 1 else "wall_ms"
        for case, runs in candidates(theirs, ours).items():
            if case not in options.cases:
                continue
            taken = measured(case, runs, options.rounds, options.seconds)
            ratio = round(taken["theirs"][clock] / taken["ours"][clock], 2)
            row = {"model": name, "parameters": ours.spec.parameters().total, "dtype": dtype, "threads": threads}
            row |= {"case": case, "times_transformers": ratio, "ratio_of": clock}
            row |= {"enough": ratio >= wanted(name, case), "median": taken}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _write(output: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    here = {
        "processor": this_cpu().name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "batch": 1,
    }
    kept = json.loads(output.read_text()) if output.exists() else {"made": {}, "rows": []}
    if any(kept["made"].get(key) != value for key, value in here.items()):
        kept = {"made": {}, "rows": []}
    merged = {_place(row): row for row in [*kept["rows"], *rows]}
    loads = kept["made"].get("load_average", {}) | {_spelled(n): os.getloadavg() for n in options.threads}
    made = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **here, "rounds": options.rounds}
    output.parent.mkdir(parents=True, exist_ok=True)
    whole = {"made": made | {"load_average": loads}, "rows": list(merged.values())}
    output.write_text(json.dumps(whole, indent=1) + "\n")


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "dtype", "threads", "case"))


def _spelled(threads: int) -> str:
    return {1: "one thread", 2: "two threads"}.get(threads, f"{threads} threads")


def tabled(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with its table of models, and its count of what holds, made from these rows."""
    columns = [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]
    short = {"float32": "fp32", "bfloat16": "bf16"}
    heads = [f"{case.replace('prefill', 'prompt')}, {short[dtype]}" for case, dtype in columns]
    by_place = {_place(row): row for row in rows}
    lines = [f"| model | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for model in MODELS:
        cells = [" / ".join(_cell(by_place.get((model, dtype, n, case))) for n in (1, 2)) for case, dtype in columns]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    page = re.sub(r"\| model \| prompt(?:.*\n)(?:\|.*\n)+", "\n".join(lines) + "\n", page)
    return re.sub(r"\b\d+ of \d+ hold\b", f"{sum(row['enough'] for row in rows)} of {len(rows)} hold", page)


def _cell(row: dict[str, Any] | None) -> str:
    """How many times as fast as transformers, bold where it is not enough; a dash where it was not measured."""
    if row is None:
        return "—"
    return f"{row['times_transformers']:.2f}" if row["enough"] else f"**{row['times_transformers']:.2f}**"


if __name__ == "__main__":
    main()
