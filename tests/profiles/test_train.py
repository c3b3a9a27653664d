"""Training: every family learns at tiny scale, a resumed run is the same run, and no accident leaves half a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import names, published
from archcompass.errors import DoesNotFitError, FileFormatError, InputError, MeasurementError
from archcompass.profiles.training import checkpoint, data
from archcompass.profiles.training.optimize import Learner
from archcompass.profiles.training.plan import Plan
from archcompass.profiles.training.reduce import reduced
from archcompass.profiles.training.run import train

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = "".join(f"{n} times {n} is {n * n}, and {n} plus {n} is {2 * n}. " for n in range(1, 300))
FAMILIES = {
    "transformer": "llama-3.1-8b",
    "moe": "qwen3-30b-a3b",
    "ssm": "mamba2-130m",
    "hybrid": "jamba-v0.1",
    "delta rule hybrid": "qwen3-next-80b-a3b",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text(TEXT)
    return path


def tiny(name: str, parameters: int = 60_000) -> ModelSpec:
    return reduced(published(name), parameters, vocab_size=256)


def after(steps: int) -> Callable[[], bool]:
    """Asks a run to stop after so many of its steps."""
    asked = iter([False] * (steps - 1) + [True] * 1000)
    return lambda: next(asked)


def weights(report_checkpoint: str | None) -> dict[str, torch.Tensor]:
    assert report_checkpoint is not None
    return load_file(Path(report_checkpoint) / checkpoint.WEIGHTS)


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_every_family_learns_at_tiny_scale(name: str, text: Path) -> None:
    plan = Plan(steps=24, batch=4, sequence=48, learning_rate=1e-2)
    report = train(tiny(name), text, plan)
    losses = [point.loss for point in report.losses]
    assert losses[0] == pytest.approx(5.55, abs=0.3), "a fresh model knows nothing: ln 256"
    assert losses[-1] < 0.75 * losses[0]
    assert report.held_out[-1].loss < 0.75 * report.held_out[0].loss
    assert report.tokens_per_second is not None
    assert report.bits_per_byte == pytest.approx(report.held_out[-1].loss / 0.6931, rel=1e-3)


@pytest.mark.parametrize("name", names())
def test_every_published_model_shrinks_and_stays_what_it_is(name: str) -> None:
    design = published(name)
    small = reduced(design, 300_000, vocab_size=256)
    assert small.parameters().total <= 450_000, "blocks with floors of their own may end above what was asked"
    assert {key: block.kind for key, block in small.blocks.items()} == {k: b.kind for k, b in design.blocks.items()}
    assert list(dict.fromkeys(small.expanded)) == list(dict.fromkeys(design.expanded))
    for key, traits in design.traits().items():
        now = small.traits()[key]
        assert (now.role, now.sparse_activation, now.bounded_state) == (
            traits.role,
            traits.sparse_activation,
            traits.bounded_state,
        )
        assert (now.window is None) == (traits.window is None)


def test_a_model_small_enough_is_left_as_it_is() -> None:
    small = tiny("jamba-v0.1")
    assert reduced(small, 10**9) == small


@pytest.mark.parametrize(("name", "precision"), [("jamba-v0.1", "fp32"), ("deepseek-v3.2", "bf16")])
def test_a_resumed_run_is_the_run_that_never_stopped(name: str, precision: str, text: Path, tmp_path: Path) -> None:
    spec = tiny(name)
    plan = Plan.asked(steps=8, batch=2, sequence=32, learning_rate=5e-3, keep_every=100, precision=precision)
    whole = train(spec, text, plan, folder=tmp_path / "whole")
    half = train(spec, text, plan, folder=tmp_path / "halves", stopped=after(3))
    assert half.steps == 3
    rest = train(spec, text, plan, folder=tmp_path / "halves", resume=True)
    assert rest.resumed_from == 3
    assert [p.loss for p in rest.losses] == [p.loss for p in whole.losses]
    assert rest.held_out[-1] == whole.held_out[-1]
    one, other = weights(whole.checkpoint), weights(rest.checkpoint)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_leaves_the_random_numbers_of_its_caller_alone(text: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tiny("mamba2-130m"), text, Plan(steps=1, batch=1, sequence=16))
    assert torch.equal(torch.rand(3), expected)


def test_each_pass_sees_every_window_once_and_a_resumed_order_goes_on() -> None:
    plan = Plan(steps=9, batch=4, sequence=2, seed=3)
    stream = iter(data.Order(10, plan, start=0))
    first = [next(stream) for _ in range(30)]
    assert all(sorted(first[at : at + 10]) == list(range(10)) for at in (0, 10, 20))
    assert first[:10] != first[10:20]
    resumed = iter(data.Order(10, plan, start=4))
    assert [next(resumed) for _ in range(14)] == first[16:30]
    halves = [iter(data.Order(10, plan, start=0, rank=rank, world=2)) for rank in (0, 1)]
    assert [next(halves[position % 2]) for position in range(30)] == first


def test_held_out_text_is_never_trained_on(text: Path) -> None:
    training, held = data.split(data.read(text), Plan(steps=1, sequence=64))
    assert len(training.values) + len(held.values) == len(TEXT)
    ids, targets = training[len(training) - 1]
    assert torch.equal(ids[1:], targets[:-1])
    assert bytes(held.values) == TEXT.encode()[-len(held.values) :]


def test_json_lines_give_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "zw\\u00f6lf", "id": 3}\n')
    assert bytes(data.read(path).values) == "one\nzwölf".encode()


BAD_DATA = {
    "empty": ("text.txt", b"", "empty"),
    "too short": ("text.txt", b"abc", "sequence is 32"),
    "no json": ("text.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
    "no text": ("text.jsonl", b'{"txet": "a"}\n', "line 1"),
    "no object": ("text.jsonl", b"[1]\n", "line 1"),
    "deep": ("text.jsonl", b"[" * 100_000 + b"\n", "line 1"),
    "no utf-8": ("text.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "hint"), BAD_DATA.values(), ids=BAD_DATA)
def test_data_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=hint):
        train(tiny("mamba2-130m"), tmp_path / name, Plan(steps=1, sequence=32))


def test_a_tokenizer_makes_the_tokens_where_its_package_is_there(tmp_path: Path, text: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"is": 0, "and": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = data.read(text, tmp_path / "tokenizer.json")
    assert (tokens.kind, tokens.vocab_size) == ("tokens", 3)
    report = train(
        tiny("mamba2-130m"), text, Plan(steps=2, batch=2, sequence=32), tokenizer=tmp_path / "tokenizer.json"
    )
    assert report.bits_per_byte is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        data.read(text, tmp_path / "tokenizer.json")


def test_what_model_and_plan_cannot_do_is_named(text: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 97"):
        train(tiny("mamba2-130m").model_copy(update={"vocab_size": 97}), text, Plan(steps=1))
    with pytest.raises(InputError, match="max_position_embeddings"):
        train(tiny("jamba-v0.1").model_copy(update={"max_position_embeddings": 8}), text, Plan(steps=1))
    with pytest.raises(DoesNotFitError, match="--scale"):
        train(published("deepseek-v3"), text, Plan(steps=1))
    with pytest.raises(InputError, match="steps is 0"):
        Plan.asked(steps=0)
    with pytest.raises(InputError, match=r"warmup \(5\)"):
        Plan.asked(steps=5, warmup=5)


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    spec = tiny("mamba2-130m")
    learner = Learner(spec, Plan(steps=2), torch.device("cpu"))
    with torch.no_grad():
        learner.kept.embedding.weight.fill_(float("nan"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    before = [parameter.clone() for parameter in learner.kept.layers.parameters()]
    with pytest.raises(MeasurementError, match="learning_rate"):
        learner.step(learner.model, ids, ids)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.kept.layers.parameters(), strict=True))


@pytest.fixture
def kept(text: Path, tmp_path: Path) -> tuple[ModelSpec, Plan, Path]:
    """A run that stopped after two of four steps."""
    spec, plan = tiny("mamba2-130m", 30_000), Plan(steps=4, batch=1, sequence=16, keep_every=100)
    train(spec, text, plan, folder=tmp_path / "run", stopped=after(2))
    return spec, plan, tmp_path / "run"


def test_a_checkpoint_holds_tensors_and_text_and_nothing_that_runs(kept: tuple[ModelSpec, Plan, Path]) -> None:
    from archcompass.blocks.model.files import load

    spec, _, folder = kept
    last = checkpoint.latest(folder)
    assert last is not None
    assert {path.name for path in last.iterdir()} == {
        "model.yaml",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert load(last / "model.yaml") == spec
    assert json.loads((last / "state.json").read_text())["step"] == 2


def test_a_run_goes_on_only_as_what_it_was(kept: tuple[ModelSpec, Plan, Path], text: Path, tmp_path: Path) -> None:
    spec, plan, folder = kept
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    with pytest.raises(InputError, match="--resume"):
        train(spec, text, plan, folder=folder)
    with pytest.raises(InputError, match="learning_rate is"):
        train(spec, text, plan.model_copy(update={"learning_rate": 0.5}), folder=folder, resume=True)
    with pytest.raises(InputError, match=r"other\.txt is not the data"):
        train(spec, other, plan, folder=folder, resume=True)
    with pytest.raises(InputError, match="another model"):
        train(tiny("rwkv7-0.1b-world"), text, plan, folder=folder, resume=True)
    assert checkpoint.latest(folder) == folder / "step-00000002"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(kept: tuple[ModelSpec, Plan, Path], text: Path, name: str) -> None:
    spec, plan, folder = kept
    path = folder / "step-00000002" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileFormatError, match="step-00000002"):
        train(spec, text, plan, folder=folder, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(
    kept: tuple[ModelSpec, Plan, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, plan, folder = kept

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FileFormatError, match="No space left"):
        train(spec, text, plan, folder=folder, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "step-00000002"]


def test_two_runs_do_not_mix_in_one_folder(kept: tuple[ModelSpec, Plan, Path], text: Path) -> None:
    spec, plan, folder = kept
    with checkpoint.held(folder), pytest.raises(InputError, match="another run"):
        train(spec, text, plan, folder=folder, resume=True)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "archcompass", "train", *map(str, arguments)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


LONG = ("--scale", "30k", "--steps", 5000, "--batch", 1, "--sequence", 16, "--keep-every", 1)


def wait_for_a_checkpoint(folder: Path) -> Path:
    deadline = time.monotonic() + 60
    while (last := checkpoint.latest(folder)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return last


@pytest.mark.slow
def test_a_killed_run_leaves_a_whole_checkpoint(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    with subprocess.Popen(command("mamba2-130m", *LONG, "--data", text, "-o", folder), env=ENVIRONMENT) as process:
        wait_for_a_checkpoint(folder)
        process.send_signal(signal.SIGKILL)
    plan = Plan(steps=5000, batch=1, sequence=16, keep_every=1)
    report = train(tiny("mamba2-130m", 30_000), text, plan, folder=folder, resume=True, stopped=after(1))
    assert report.resumed_from is not None
    assert report.steps == report.resumed_from + 1
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_ctrl_c_says_what_was_kept(text: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "long"

    def press() -> None:
        wait_for_a_checkpoint(folder)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    done = cli("train", "mamba2-130m", *LONG, "--data", text, "-o", folder)
    presser.join()
    last = checkpoint.latest(folder)
    assert done.code == 130
    assert last is not None
    assert last.name in done.err.replace("\n", "")
    assert "--resume" in done.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_two_processes_share_each_batch_and_learn_the_same(text: Path, tmp_path: Path) -> None:
    flags = ("jamba-v0.1", "--scale", "60k", "--data", text, "--steps", 3, "--batch", 4, "--sequence", 32, "--json")
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", *command(*flags, "-o", tmp_path / "two")[3:]],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    plan = Plan(steps=3, batch=4, sequence=32)
    one = train(tiny("jamba-v0.1"), text, plan, folder=tmp_path / "one")
    assert two["processes"] == 2
    # Experts' load-balance loss is taken over each process's own tokens, so the two agree closely and not exactly.
    assert [p["loss"] for p in two["losses"]] == pytest.approx([p.loss for p in one.losses], rel=2e-3)
    assert two["held_out"][-1]["loss"] == pytest.approx(one.held_out[-1].loss, rel=2e-3)


def test_the_command_says_in_json_what_it_did(text: Path, cli: Callable[..., Any]) -> None:
    words = ("train", "jamba-v0.1", "--scale", "100k", "--data", text, "--steps", 4, "--batch", 2, "--sequence", 32)
    said, shown = json.loads(cli(*words, "--json").out), cli(*words).out
    assert said["reduced_from"] == published("jamba-v0.1").parameters().total
    assert [point["step"] for point in said["losses"]] == [1, 2, 3, 4]
    assert "held-out loss" in shown
    assert "Reduced from" in shown
