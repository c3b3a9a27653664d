"""How well the ledger foresees the memory that torch really takes: whole models, inference and training, row by row.

    python benchmarks/memory.py [--phases all|inference|training] [--only NAME ...] [--write] [--again]

Every storage that a call creates is followed until it dies (`archcompass.profiles.measure.peak`), which gives the very bytes
that torch's allocator sees, workspaces inside one library call left out. Total is weights, state, activations, and in training
gradients and AdamW's moments. Bytes do not depend on how busy the machine is. Writes benchmarks/results/memory.json; --again
measures nothing and asks the ledger anew about the rows that are kept there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from archcompass.blocks.model.module import Sublayer
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import published
from archcompass.profiles.hardware import find
from archcompass.profiles.ledger import memory
from archcompass.profiles.measure import build
from archcompass.profiles.measure.peak import tensor_peak_bytes
from archcompass.profiles.request import Request

TARGET = Path(__file__).resolve().parent / "results" / "memory.json"
CPU = torch.device("cpu")
MOST_TRAINED = 300_000_000
TRAINED_TOKENS = 2048
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

PUBLISHED = ("mamba-130m", "mamba2-130m", "rwkv-4-169m-pile", "rwkv7-0.1b-world", "gemma-3-1b", "qwen3-0.6b")


def own(name: str, width: int, layers: str, **blocks: dict[str, Any]) -> ModelSpec:
    fields = {"name": name, "hidden_size": width, "vocab_size": 32000, "layers": layers, "blocks": blocks}
    return ModelSpec.model_validate(fields)


def attention(heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    shape = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 64}
    return {"kind": "attention"} | shape | more


def models() -> list[ModelSpec]:
    """Models of all families, small enough to be trained here."""
    mlp = {"kind": "gated_mlp", "intermediate_size": 2048}
    moe = {"kind": "moe", "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    mamba2 = {"kind": "mamba2", "num_heads": 24, "head_dim": 64, "state_size": 128}
    delta = {
        "kind": "gated_delta_net",
        "num_key_heads": 6,
        "num_value_heads": 12,
        "key_head_dim": 64,
        "value_head_dim": 64,
    }
    kimi = {"kind": "kimi_delta", "num_attention_heads": 6, "head_dim": 128}
    latent = {"kind": "mla", "num_attention_heads": 12, "q_lora_rank": 384, "kv_lora_rank": 256}
    latent |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    gla = {"kind": "gla", "num_attention_heads": 4, "key_head_dim": 96, "value_head_dim": 192}
    lru = {"kind": "rg_lru", "lru_width": 768, "num_attention_heads": 8}
    window = attention(12, 4, sliding_window=128)
    full = attention(12, 4)
    return [
        own("transformer", 768, "12*(a m)", a=attention(12, 12), m=mlp),
        own("transformer, grouped heads", 1024, "8*(a m)", a=attention(16, 4), m=mlp),
        own("windows and full attention", 768, "2*(w m | w m | w m | a m)", w=window, a=full, m=mlp),
        own("latent attention", 768, "8*(a m)", a=latent, m=mlp),
        own("experts", 768, "8*(a e)", a=full, e=moe),
        own("mamba-2 and attention", 768, "3*(s m | s m | s m | a m)", s=mamba2, a=full, m=mlp),
        own("mamba-2, attention and experts", 768, "2*(s m | s e | s m | a e)", s=mamba2, a=full, m=mlp, e=moe),
        own("delta rule and attention", 768, "2*(d m | d m | d m | a m)", d=delta, a=full, m=mlp),
        own("kimi delta and latent attention", 768, "2*(k m | k m | k m | a m)", k=kimi, a=latent, m=mlp),
        own("gated linear attention", 768, "8*(g m)", g=gla, m=mlp),
        own("rg-lru and windows", 768, "2*(r m | r m | w m)", r=lru, w=window, m=mlp),
        *(published(name) for name in PUBLISHED),
    ]


def inference_rows(spec: ModelSpec, prompt: int, precision: str) -> list[dict[str, Any]]:
    """Prefill of a prompt, and one step after it."""
    request = Request(prompt=prompt, generate=0, precision=precision)
    model = build.model(spec, CPU, build.dtype_of(request))
    ids = torch.randint(0, spec.vocab_size, (1, prompt))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rows = []
    with torch.inference_mode():
        model(ids, logits_to_keep=1)
        kept: list[Any] = []
        peak, _ = tensor_peak_bytes(lambda: kept.append(model(ids, logits_to_keep=1, room=1)), CPU)
        state = kept.pop().state
        rows.append(row(spec, "prefill", request, weights + peak, state.nbytes, weights))
        left = state.held_bytes
        stepped = replace(request, prompt=1, generate=prompt)
        peak, _ = tensor_peak_bytes(lambda: model(ids[:, :1], state, logits_to_keep=1), CPU)
        rows.append(row(spec, "decode", stepped, weights + left + peak, state.nbytes, weights))
    return rows


def training_rows(spec: ModelSpec, recompute: str) -> list[dict[str, Any]]:
    return [training_row(few_layers(spec), TRAINED_TOKENS, "fp32", recompute)]


def few_layers(spec: ModelSpec) -> ModelSpec:
    """One repetition of the layers' pattern, or four layers, so that activations outweigh the weights."""
    few = re.sub(r"^\d+\*", "", spec.layers) if "|" in spec.layers else re.sub(r"^\d+\*", "4*", spec.layers)
    return spec.with_layers(few)


def trained(tokens: int, precision: str, recompute: str) -> Request:
    """The question of a training row."""
    return Request(prompt=tokens, generate=0, mode="training", precision=precision, recompute=recompute)  # type: ignore[arg-type]


def training_row(spec: ModelSpec, tokens: int, precision: str, recompute: str) -> dict[str, Any]:
    """The second of two steps, moments being there."""
    torch.manual_seed(0)
    request = trained(tokens, precision, recompute)
    model = build.model(spec, CPU, build.dtype_of(request)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, spec.vocab_size, (1, tokens))

    def step() -> None:
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with recomputing(recompute):
        step()
        peak, _ = tensor_peak_bytes(step, CPU)
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    moments = sum(value.nbytes for value in tensors)
    return row(spec, f"training, {recompute}", request, weights + moments + peak, 0, weights)


@contextmanager
def recomputing(how: str) -> Iterator[None]:
    """Sublayers that compute themselves again in the backward pass, wholly or but for their products."""
    if how == "none":
        yield
        return
    plain = Sublayer.forward

    def policy(_context: Any, op: Any, *_args: Any, **_more: Any) -> CheckpointPolicy:
        attends = "scaled_dot_product" in str(op)
        return CheckpointPolicy.MUST_SAVE if op in PRODUCTS or attends else CheckpointPolicy.PREFER_RECOMPUTE

    chosen = partial(create_selective_checkpoint_contexts, policy)

    def forward(self: Sublayer, h: Any, state: Any, context: Any) -> Any:
        more: dict[str, Any] = {"context_fn": chosen} if how == "selective" else {}
        return checkpoint(partial(plain, self), h, state, context, use_reentrant=False, **more)

    Sublayer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sublayer.forward = plain  # type: ignore[method-assign]


def row(spec: ModelSpec, phase: str, request: Request, seen: int, state: int, weights: int) -> dict[str, Any]:
    """Seen beside foreseen, without what the process holds besides."""
    found = memory(spec, request, find("cpu"))
    spare = found.detail.get("room for windows to move in", 0.0)
    parts = (found.weights_bytes, found.state_bytes, found.activation_bytes, found.training_bytes, spare)
    beside = seen - weights
    return {
        "model": spec.name, "phase": phase, "tokens": request.context, "precision": request.precision,
        "seen_bytes": seen, "foreseen_bytes": round(sum(parts)), "ratio": round(sum(parts) / seen, 4),
        "seen_beside_weights": beside, "ratio_beside_weights": round((sum(parts) - found.weights_bytes) / beside, 4),
        "weights_exact": weights == found.weights_bytes, "state_exact": state == found.state_bytes,
    }  # fmt: skip


def jobs(spec: ModelSpec, phases: str) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What is measured of a model."""
    if phases != "training":
        yield from (partial(inference_rows, spec, *how) for how in ((1024, "bf16"), (4096, "bf16"), (1024, "fp32")))
    if phases != "inference" and spec.parameters().total < MOST_TRAINED:
        yield from (partial(training_rows, spec, how) for how in ("none", "selective", "full"))


def line(one: dict[str, Any]) -> str:
    return (
        f"{one['model'][:32]:32s} {one['phase']:19s} {one['tokens']:5d} {one['precision']} {one['seen_bytes'] / 1e6:9.1f} MB"
        f"  total {one['ratio']:.3f}  beside weights {one['ratio_beside_weights']:.3f}"
    )


def renewed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept, with `rows` in the place of those that asked the same."""

    def question(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["model"], one["phase"], one["tokens"], one["precision"]

    before = json.loads(TARGET.read_text(encoding="utf-8"))["rows"] if TARGET.is_file() else []
    asked = {question(one): one for one in rows}
    known = [asked.pop(question(one), one) for one in before]
    return [*known, *asked.values()]


def again(kept: dict[str, Any]) -> dict[str, Any]:
    """A kept row with what the ledger foresees today."""
    spec = next(one for one in models() if one.name == kept["model"])
    phase, tokens, precision = kept["phase"], kept["tokens"], kept["precision"]
    if phase.startswith("training"):
        spec, request = few_layers(spec), trained(tokens, precision, phase.split(", ")[1])
    elif phase == "decode":
        request = Request(prompt=1, generate=tokens - 1, precision=precision)
    else:
        request = Request(prompt=tokens, generate=0, precision=precision)
    weights = kept["seen_bytes"] - kept["seen_beside_weights"]
    now = row(spec, phase, request, kept["seen_bytes"], 0, weights)
    return now | {name: kept[name] for name in ("weights_exact", "state_exact")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", choices=("all", "inference", "training"), default="all")
    parser.add_argument(
        "--only", nargs="*", default=[], help="models whose name contains one of these, beside kept rows"
    )
    parser.add_argument("--again", action="store_true", help="ask the ledger anew about the kept rows")
    parser.add_argument("--write", action="store_true", help="renew these rows in benchmarks/results/memory.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.again:
        rows = [again(one) for one in json.loads(TARGET.read_text(encoding="utf-8"))["rows"]]
    for spec in [] if arguments.again else models():
        if arguments.only and not any(word in spec.name for word in arguments.only):
            continue
        for job in jobs(spec, arguments.phases):
            for one in job():
                rows.append(one)
                print(line(one), flush=True)
    errors = [abs(one["ratio"] - 1) for one in rows]
    print(f"{len(rows)} rows: median {median(errors):.2%}, worst {max(errors):.2%}")
    if arguments.write:
        rows = renewed(rows)
        made = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        TARGET.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
