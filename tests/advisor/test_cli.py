"""The command line as scripts see it: JSON on stdout, one line on stderr, exit codes 0, 1 and 2, never a traceback."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

MODEL = (ROOT / "tests" / "data" / "small.yaml").read_text()

Cli = Callable[..., Any]
"""The fixture of tests/conftest.py."""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL)
    return path


def test_help_names_every_command(cli: Cli) -> None:
    done = cli("--help")
    for command in (
        "ask",
        "recommend",
        "advise",
        "profile",
        "compare",
        "models",
        "gpus",
        "convert",
        "verify",
        "doctor",
    ):
        assert command in done.out


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_recommend_answers_every_example(cli: Cli, example: Path) -> None:
    done = cli("recommend", example, "--json")
    answer = json.loads(done.out)
    assert done.code == 0
    assert {"workload", "family", "confidence", "rules", "candidates", "flips", "published"} <= set(answer)
    assert {c["family"] for c in answer["candidates"]} == {"transformer", "moe", "ssm", "hybrid"}
    assert [c["rank"] for c in answer["candidates"]] == [1, 2, 3, 4]
    assert answer["candidates"][0]["family"] == answer["family"]
    assert answer["candidates"][0]["fits"]
    assert 0 <= answer["confidence"] <= 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("columns", [80, 100])
def test_the_terminal_report_stays_within_its_columns(
    cli: Cli, example: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    done = cli("recommend", example)
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= columns
    assert "\x1b[" not in done.out


@pytest.mark.parametrize("mode", ["training", "finetuning"])
@pytest.mark.parametrize("gpu", ["h100-sxm", "64x h100-sxm"])
def test_what_is_trained_is_told_in_tokens_and_days(cli: Cli, mode: str, gpu: str) -> None:
    done = cli("recommend", "--mode", mode, "--context", "4k", "--gpu", gpu)
    assert done.code == 0
    assert "days" in done.out
    assert "decode/user" not in done.out


def test_high_effort_shows_what_could_be_had_instead(cli: Cli) -> None:
    done = cli("recommend", "--gpu", "l40s", "--effort", "high")
    assert "Could be had instead" in done.out
    assert "dense-equivalent" in done.out
    front = json.loads(cli("recommend", "--gpu", "l40s", "--effort", "high", "--json").out)["front"]
    assert len(front) > 5
    assert {"family", "name", "precision", "quality", "memory_bytes", "per_user"} <= set(front[0])
    assert json.loads(cli("recommend", "--gpu", "l40s", "--json").out)["front"] == []


def test_a_family_that_stands_in_says_what_the_better_one_needs(cli: Cli) -> None:
    done = cli("recommend", "--context", "4M", "--concurrency", 33, "--vram", "8GB", "--gpu", "t4")
    assert "only stands in" in " ".join(done.out.split())
    assert "a near tie" not in done.out


def test_experts_in_system_memory_are_told(cli: Cli) -> None:
    asked = ["recommend", "--task", "qa", "--breadth", "encyclopedic", "--knowledge", "weights", "--ram", "96GB"]
    one, many = (" ".join(cli(*asked, "--context", "8k", "--concurrency", users).out.split()) for users in (1, 8))
    assert "of experts in system memory" in one
    assert "are not counted on" in many


def test_flags_override_the_file(cli: Cli) -> None:
    done = cli("recommend", EXAMPLES[0], "--gpu", "L4", "--context", "8k", "--json")
    workload = json.loads(done.out)["workload"]
    assert workload["context"] == 8192
    assert "l4" in workload["gpu"].lower()


BAD_FLAGS = {
    "breadth": ("--breadth", "hugee", "broad"),
    "context zero": ("--context", "0", "context"),
    "context negative": ("--context", "-5", "context"),
    "card": ("--gpu", "rtx-4091", "rtx-4090"),
    "vram": ("--vram", "12parsecs", "vram"),
    "precision": ("--precision", "int5", "int4"),
    "unknown flag": ("--contxt", "5", "--context"),
}


@pytest.mark.parametrize(("flag", "value", "hint"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_bad_flag_is_one_line_that_names_the_nearest_right_value(cli: Cli, flag: str, value: str, hint: str) -> None:
    done = cli("recommend", flag, value)
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1
    assert hint in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["profile", "llama-3.1-8b", "--batch", "1.5"], "--batch is 1.5; write a whole number; nearest: 2"),
        (["profile", "llama-3.1-8b", "--prompt", "0"], "--prompt is 0; it must lie between 1 and"),
        (["compare", "--values", "4k,a"], "--values is 'a'"),
    ],
    ids=lambda words: words[0],
)
def test_a_number_that_is_none_names_its_flag(cli: Cli, words: list[str], said: str) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_nothing_need_be_generated(cli: Cli) -> None:
    (entry,) = json.loads(cli("profile", "llama-3.1-8b", "--gpu", "l4", "--generate", 0, "--json").out)["profiles"]
    assert entry["generate"] == 0
    assert entry["decode"] is None


BAD_FILES = {
    "list": b"- a\n- b\n",
    "empty": b"",
    "binary": bytes(range(256)),
    "tagged": b"context: !!python/object/apply:os.system ['true']\n",
    "aliases": b"a: &a [1, 1]\nb: &b [*a, *a]\ncontext: *b\n",
    "unknown key": b"contxt: 4k\n",
    "unclosed": b"context: [4k\n",
    "huge": b"# x\n" * 2_000_000,
    "nothing there": None,
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("command", ["recommend", "profile"])
def test_a_bad_file_is_one_line(cli: Cli, tmp_path: Path, content: bytes | None, command: str) -> None:
    path = tmp_path / "given.yaml"
    if content is not None:
        path.write_bytes(content)
    done = cli(command, path)
    assert done.code == 2
    assert "given.yaml" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert "Traceback" not in done.err


BAD_MODELS = {
    "heads": ("num_key_value_heads: 2", "num_key_value_heads: 3", "num_key_value_heads (3) must divide"),
    "width": ("hidden_size: 64", "hidden_size: 0", "hidden_size"),
    "key": ("intermediate_size", "intermediate_sise", "intermediate_size"),
    "kind": ("kind: gated_mlp", "kind: gated_mlpp", "gated_mlp"),
    "experts": (
        "{kind: gated_mlp, intermediate_size: 128}",
        "{kind: moe, num_experts: 4, num_experts_per_tok: 8, moe_intermediate_size: 64}",
        "num_experts_per_tok (8)",
    ),
    "header": ("archcompass: 1", "archcompass: 7", "archcompass"),
    "pattern": ("2*(attention mlp)", "2*(attention mlp", "never closed"),
    "name": ("2*(attention mlp)", "2*(attention mpl)", "mlp"),
}


@pytest.mark.parametrize(("old", "new", "hint"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_an_impossible_model_is_one_line(cli: Cli, tmp_path: Path, old: str, new: str, hint: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.replace(old, new))
    done = cli("profile", path, "--gpu", "l4")
    assert done.code == 2
    assert hint in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_an_unknown_model_names_the_nearest(cli: Cli) -> None:
    done = cli("profile", "lama-3.1-8b", "--gpu", "l4")
    assert done.code == 2
    assert "llama-3.1-8b" in done.err


def test_what_does_not_fit_exits_with_1_and_says_what_would(cli: Cli) -> None:
    done = cli("recommend", "--context", "8k", "--gpu", "l4", "--vram", "100MB")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_profile_predicts_with_the_keys_scripts_rely_on(cli: Cli, model_file: Path) -> None:
    done = cli("profile", model_file, "--gpu", "l4", "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert {"model", "parameters", "hardware", "precision", "batch", "prompt", "generate", "profiles"} <= set(report)
    (entry,) = report["profiles"]
    assert entry["source"] in ("roofline", "calibrated")
    memory = entry["memory"]
    parts = [memory[key] for key in ("weights_bytes", "state_bytes", "activation_bytes", "overhead_bytes")]
    assert sum(parts) == pytest.approx(memory["total_bytes"], rel=1e-6)
    assert entry["prefill"]["ms"] > 0
    assert entry["decode"]["ms_per_token"] > 0


def test_profile_of_a_model_too_large_exits_with_1(cli: Cli) -> None:
    done = cli("profile", "llama-3.1-405b", "--gpu", "l4", "--json")
    assert done.code == 1
    assert not json.loads(done.out)["profiles"][0]["fits"]


def test_profile_measures_on_this_machine(cli: Cli, model_file: Path) -> None:
    done = cli("profile", model_file, "--device", "cpu", "--prompt", "32", "--generate", "4", "--json")
    report = json.loads(done.out)
    measured = [entry for entry in report["profiles"] if entry["source"] == "measured"]
    assert done.code == 0
    assert measured
    assert measured[0]["prefill"]["ms"] > 0


@pytest.mark.slow
def test_advise_writes_files_that_load_again_to_an_equal_model(cli: Cli, tmp_path: Path) -> None:
    from archcompass.advisor.workload import Workload
    from archcompass.blocks.model.files import load

    out = tmp_path / "out"
    done = cli("advise", "--context", "4k", "--gpu", "rtx-3060-12", "--vram", "2GB", "-o", out, "--json")
    assert done.code == 0, done.err
    report = json.loads((out / "report.json").read_text())
    assert Workload.from_file(out / "workload.yaml").context == 4096
    spec = load(out / "model.yaml")
    assert spec.parameters().total == report["recommendation"]["candidates"][0]["parameters"]["total"]
    assert any(entry["source"] in ("measured", "sampled") for entry in report["profile"]["profiles"])
    assert all(entry["memory"]["capacity_bytes"] < 2**50 for entry in report["profile"]["profiles"])
    assert shlex.split(report["profile"]["check"])[:3] == ["archcompass", "profile", str(out / "model.yaml")]
    assert not list(out.glob(".*")), "nothing half-written is left behind"


@pytest.mark.parametrize("command", [["models"], ["gpus"], ["models", "llama-3.1-8b"], ["gpus", "4090"]], ids=" ".join)
def test_the_catalogues_answer_in_every_form(cli: Cli, command: list[str]) -> None:
    rows = json.loads(cli(*command, "--json").out)
    assert rows
    assert all(row["source"] for row in rows)
    assert cli(*command).out.strip()


def test_doctor_says_which_kernel_serves_which_operation(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json").out)
    assert {"attention", "linear_attention", "moe"} <= {row["operation"] for row in found["operations"]}
    assert all(row["reason"] for row in found["operations"])
    on_cpu = [row for row in found["operations"] if row["device"] == "cpu"]
    assert all(row["example"] and row["predicted_ms"][row["backend"]] > 0 for row in on_cpu)
    assert found["versions"]["torch"]


def test_ask_over_a_pipe_survives_a_wrong_answer(tmp_path: Path) -> None:
    answers = "rag\nb\nrag\nhuge\n128k\nexact\n\n\n\nL4\n\n\n"
    command = [sys.executable, "-P", "-m", "archcompass", "ask", "--only-recommend", "--json", "-o", str(tmp_path)]
    done = subprocess.run(command, input=answers, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["workload"]["task"] == "rag"
    assert answer["workload"]["context"] == 131072
    assert "context" in done.stderr
    assert yaml.safe_load((tmp_path / "workload.yaml").read_text())["task"] == "rag"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recommend", "--help"], ["recommend", "--json"], ["gpus"], ["models"]], ids=" ".join
)
def test_the_quick_commands_never_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom archcompass.advisor.cli.app import run\n"
        f"sys.argv = ['archcompass', *{arguments!r}]\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'triton', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_list_of_commands_says_what_each_command_says_of_itself() -> None:
    from importlib import import_module

    from archcompass.advisor.cli.commands import COMMANDS

    for name, command in COMMANDS.items():
        function = getattr(import_module(f"archcompass.advisor.cli.{command.file}"), name)
        assert function.__doc__.strip().splitlines()[0] == command.summary, name


def test_every_command_answers_in_json(cli: Cli) -> None:
    from archcompass.advisor.cli.commands import COMMANDS

    assert [name for name in COMMANDS if "--json" not in cli(name, "--help").out] == []


def test_a_calibration_says_what_speaks_against_it() -> None:
    from archcompass.advisor.cli.calibrate import doubts

    sound = {"left_out": [], "load": 1.5, "threads": 2}
    assert doubts(sound) == doubts(sound | {"load": None}) == []
    assert "left out" in doubts(sound | {"left_out": ["mamba in bf16"]})[0]
    assert "idle" in doubts(sound | {"load": 4.5})[0]
