"""Exports open where they say they do: transformers loads and trains them, editors know the file, recipes parse."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from archcompass.advisor.export import TARGETS, export
from archcompass.advisor.launch import VLLM_ARCHITECTURES, VLLM_NEWER
from archcompass.advisor.recommend import recommend
from archcompass.advisor.workload import Workload
from archcompass.blocks.base import known_blocks
from archcompass.blocks.hf import to_config
from archcompass.blocks.hf.configuration import family, model_types
from archcompass.blocks.model.files import dump, load
from archcompass.blocks.model.schema import schema
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import names, published
from archcompass.errors import ConversionError, DoesNotFitError, FileFormatError, InputError, UnknownNameError
from archcompass.profiles.hardware import find
from archcompass.profiles.training.plan import Plan
from archcompass.profiles.training.reduce import reduced
from archcompass.profiles.training.run import train

TEXT = "the quick brown fox jumps over the lazy dog. " * 80


pytestmark = pytest.mark.usefixtures("one_thread", "quiet_transformers")


def tiny(name: str) -> ModelSpec:
    return reduced(published(name), 60_000, vocab_size=256)


SHORT, LONG = {"context": "4k", "gpu": "l40s"}, {"context": "128k", "gpu": "2x h100-sxm", "recall": "exact"}
BROAD, NARROW = {"breadth": "encyclopedic", "knowledge": "weights"}, {"breadth": "narrow"}
ADVISED = {
    "transformer": ("transformer", SHORT, "qwen3"),
    "transformer with windows": ("transformer", LONG, "qwen3"),
    "moe": ("moe", SHORT, "qwen3_moe"),
    "moe with windows": ("moe", LONG, "mellum"),
    "ssm": ("ssm", SHORT, "mamba2"),
    "hybrid": ("hybrid", SHORT | NARROW, "qwen3_next"),
    "hybrid with experts": ("hybrid", LONG | BROAD, "qwen3_next"),
}


@pytest.mark.parametrize(("chosen", "workload", "model_type"), ADVISED.values(), ids=ADVISED)
def test_the_advisors_own_designs_train_in_transformers(
    chosen: str, workload: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    """The family's candidate for a workload, every layer kind kept, as small as a test can wait for."""
    answer = recommend(Workload(**workload))
    design = next(candidate.model for candidate in answer.candidates if candidate.family == chosen)
    assert design is not None
    assert to_config(design)["model_type"] == model_type
    assert_learns_in_transformers(reduced(design, 300_000, vocab_size=256), tmp_path)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "bamba-9b"], ids=["transformer", "hybrid"])
def test_the_hf_folder_opens_in_transformers_and_trains_there(name: str, tmp_path: Path) -> None:
    assert_learns_in_transformers(tiny(name), tmp_path)


def assert_learns_in_transformers(spec: ModelSpec, tmp_path: Path) -> None:
    """Exports `spec`, opens the folder in transformers, and trains there for 20 steps."""
    from transformers import AutoModelForCausalLM

    export(spec, tmp_path, "hf", weights="random", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters().total
    assert model.generation_config.max_new_tokens == 256
    ids = torch.tensor(list(TEXT[:256].encode())).view(4, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(5.55, abs=0.4)
    assert losses[-1] < 0.7 * losses[0]


def test_trained_weights_say_the_same_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec, text = reduced(published("jamba-v0.1"), 300_000, vocab_size=256), tmp_path / "text.txt"
    text.write_text(TEXT)
    report = train(spec, text, Plan(steps=3, batch=2, sequence=32), folder=tmp_path / "run")
    export(spec, tmp_path / "hf", "hf", weights=str(tmp_path / "run"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    held = TEXT.encode()[-int(report.data["held_out_tokens"]) :]
    ids = torch.tensor(list(held[: 32 + 1]))[None]
    ours = spec.build()
    from archcompass.profiles.training.checkpoint import latest, load_weights

    last = latest(tmp_path / "run")
    assert last is not None
    load_weights(last, ours)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours.eval()(ids).logits, atol=1e-5)
    export(spec, tmp_path / "half", "hf", weights=str(last), dtype="bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_without_weights_only_the_configuration_is_written(tmp_path: Path) -> None:
    written = export(published("llama-3.1-405b"), tmp_path, "hf")
    assert [path.name for path in written] == ["config.json", "generation_config.json"]
    assert load(tmp_path).parameters() == published("llama-3.1-405b").parameters()


def test_the_yaml_names_its_schema_and_loads_again(tmp_path: Path) -> None:
    spec = published("jamba-v0.1")
    export(spec, tmp_path, "yaml")
    text = (tmp_path / "model.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=model.schema.json\n")
    assert load(tmp_path / "model.yaml") == spec
    assert json.loads((tmp_path / "model.schema.json").read_text()) == schema()


def problems(value: Any, rule: dict[str, Any], whole: dict[str, Any], at: str = "") -> list[str]:
    """What a JSON Schema of the kind that pydantic writes finds wrong; no more of the standard than is used there."""
    if "$ref" in rule:
        return problems(value, whole["$defs"][rule["$ref"].rpartition("/")[2]], whole, at)
    for key in ("anyOf", "oneOf"):
        if key in rule:
            tried = [problems(value, option, whole, at) for option in rule[key]]
            fitting = sum(not found for found in tried)
            if fitting == 0 or (key == "oneOf" and fitting > 1):
                return min(tried, key=len) or [f"{at}: {fitting} options fit"]
    found = []
    if "const" in rule and value != rule["const"]:
        found.append(f"{at} is {value!r}, not {rule['const']!r}")
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{at} is {value!r}")
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    kinds["null"] = type(None)
    if "type" in rule and not isinstance(value, kinds[rule["type"]]):
        return [*found, f"{at} is no {rule['type']}"]
    if "exclusiveMinimum" in rule and not value > rule["exclusiveMinimum"]:
        found.append(f"{at} is {value}")
    if isinstance(value, dict) and rule.get("type") == "object":
        fields = rule.get("properties", {})
        found += [f"{at}.{key} is missing" for key in rule.get("required", []) if key not in value]
        for key, entry in value.items():
            extra = rule.get("additionalProperties", True)
            if key in fields:
                found += problems(entry, fields[key], whole, f"{at}.{key}")
            elif extra is False:
                found.append(f"{at}.{key} is unknown")
            elif isinstance(extra, dict):
                found += problems(entry, extra, whole, f"{at}.{key}")
    return found


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    return schema()


@pytest.mark.parametrize("name", names())
def test_the_schema_accepts_every_published_model(name: str, rules: dict[str, Any]) -> None:
    assert problems(dump(published(name)), rules, rules) == []


WRONG: dict[str, tuple[str, Any]] = {
    "no header": ("archcompass: 1\n", ""),
    "version": ("archcompass: 1", "archcompass: 2"),
    "width": ("hidden_size: 4096", "hidden_size: 0"),
    "word for number": ("hidden_size: 4096", "hidden_size: wide"),
    "field": ("hidden_size: 4096", "hidden_sise: 4096"),
    "kind": ("kind: gated_mlp", "kind: gated_mpl"),
    "block field": ("intermediate_size", "intermediate_sise"),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG)
def test_the_schema_refuses_what_the_reader_refuses(old: str, new: str, rules: dict[str, Any]) -> None:
    from archcompass.blocks.model.files import parse

    text = yaml.safe_dump(dump(published("llama-3.1-8b")), sort_keys=False)
    assert old in text
    data = yaml.safe_load(text.replace(old, new))
    assert problems(data, rules, rules)
    with pytest.raises(InputError):
        parse(data)


def test_every_registered_block_is_in_the_schema(rules: dict[str, Any]) -> None:
    for kind, block in known_blocks().items():
        assert rules["$defs"][block.__name__]["properties"]["kind"]["const"] == kind
        for tiny_one in block.tiny():
            given = tiny_one.model_dump(mode="json")
            assert problems(given, {"$ref": "#/$defs/Block"}, rules) == [], given


def command_of(script: Path) -> list[str]:
    """The words of the script's command, as a shell reads them; the shell finds no fault with the script."""
    subprocess.run(["sh", "-n", str(script)], check=True)
    lines = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    return shlex.split(" ".join(line.rstrip("\\") for line in lines[2:]))


def test_the_vllm_recipe_serves_the_folder_it_stands_in(tmp_path: Path) -> None:
    export(published("jamba-v0.1"), tmp_path, "vllm", context=65536, sequences=4, hardware=find("2x h100-sxm"))
    words = command_of(tmp_path / "serve.sh")
    assert words[:3] == ["vllm", "serve", "."]
    for flag, value in (("--max-model-len", "65536"), ("--max-num-seqs", "4"), ("--tensor-parallel-size", "2")):
        assert words[words.index(flag) + 1] == value
    assert words[words.index("--load-format") + 1] == "dummy", "no weights stand there"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0] in VLLM_ARCHITECTURES
    export(tiny("llama-3.1-8b"), tmp_path / "with", "vllm", weights="random")
    assert "--load-format" not in command_of(tmp_path / "with" / "serve.sh")


def test_our_architectures_that_vllm_lists_are_ours() -> None:
    assert {family(name).architecture for name in model_types()} >= VLLM_ARCHITECTURES | VLLM_NEWER.keys()


def test_the_training_recipe_is_a_command_of_ours(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words after the module are given to the command line itself, with what it would run put in its place."""
    from archcompass.profiles.training import run as training

    export(published("mamba-1.4b"), tmp_path, "torchrun", data="a text's file.txt", hardware=find("2x h100-sxm"))
    words = command_of(tmp_path / "train.sh")
    assert words[:6] == ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "archcompass"]
    seen: dict[str, Any] = {}

    def instead(spec: ModelSpec, file: Path, plan: Plan, **rest: Any) -> None:
        seen.update(spec=spec, file=file, plan=plan, **rest)
        raise InputError("seen")

    monkeypatch.setattr(training, "train", instead)
    monkeypatch.chdir(tmp_path)
    assert "seen" in cli(*words[6:]).err
    assert seen["spec"] == published("mamba-1.4b")
    assert seen["file"] == Path("a text's file.txt")
    assert (seen["plan"].steps, seen["plan"].precision, seen["device"]) == (1000, "bf16", "cuda")
    assert seen["resume"]


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "target": ("llama-3.1-8b", {"target": "vlm"}, UnknownNameError, "vllm"),
    "architecture": ("rwkv7-0.1b-world", {"target": "vllm"}, ConversionError, "architectures"),
    "heads": (
        "llama-3.1-8b",
        {"target": "vllm", "hardware": find("3x h100-sxm")},
        ConversionError,
        "num_attention_heads is 32",
    ),
    "longer than it was made for": (
        "llama-3.1-8b",
        {"target": "vllm", "context": 2**20},
        ConversionError,
        "max_position_embeddings is 131,072.*nearest: 131,072",
    ),
    "heads of a recurrent layer": (
        "qwen3-next-80b-a3b",
        {"target": "vllm", "hardware": find("3x h100-sxm")},
        ConversionError,
        "heads is",
    ),
    "too large for a card": (
        "jamba-v0.1",
        {"target": "torchrun", "hardware": find("2x h100-sxm")},
        ConversionError,
        "parameters is",
    ),
    "too large for here": ("deepseek-v3", {"target": "hf", "weights": "random"}, DoesNotFitError, "--weights"),
    "no checkpoint": ("mamba-130m", {"target": "hf", "weights": "nowhere"}, FileFormatError, "nowhere"),
    "weights without a place": ("llama-3.1-8b", {"target": "yaml", "weights": "random"}, InputError, "weights"),
    "family": ("jamba-v0.1", {"target": "hf", "model_type": "llama"}, ConversionError, "llama cannot say"),
}


@pytest.mark.parametrize(("name", "asked", "error", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_a_target_cannot_say_is_named(
    name: str, asked: dict[str, Any], error: type[Exception], hint: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=hint):
        export(published(name), tmp_path / "out", **asked)
    assert not list(tmp_path.glob("out/model*"))


def test_every_target_is_offered_by_the_command(tmp_path: Path, cli: Callable[..., Any]) -> None:
    for target in TARGETS:
        done = cli("export", "mamba-130m", tmp_path / target, "--to", target, "--json")
        assert done.code == 0
        assert all(Path(path).is_file() for path in json.loads(done.out)["written"])
    assert json.loads(cli("schema").out) == schema()
