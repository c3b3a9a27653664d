"""Files and flags that mean harm, or make no sense: one line, exit code 2, no hang, nothing run, nothing written elsewhere."""

from __future__ import annotations

import json
import os
import shlex
import string
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archcompass.blocks.model.files import MAX_FILE_BYTES, dump, load, parse, to_yaml, write_text
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import published
from archcompass.errors import ArchcompassError, FileFormatError, InputError
from archcompass.profiles.profile import profile

MODEL = (Path(__file__).resolve().parent.parent / "data" / "small.yaml").read_text()
ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.exe"
RUNS = int(os.environ.get("ARCHCOMPASS_FUZZ", "120"))
"""Inputs that each fuzzing test tries; the same ones every time, unless more are asked for."""

FUZZ = settings(
    max_examples=RUNS,
    deadline=2000,
    derandomize="ARCHCOMPASS_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


Cli = Callable[..., Any]
"""The fixture of tests/conftest.py: what is said can be printed, and bad input is refused in one line."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to work in, beside a file that nobody may touch and in a folder where nothing may appear."""
    (tmp_path / "precious").write_text("keep")
    inside = tmp_path / "work"
    inside.mkdir()
    before = os.getcwd()
    os.chdir(inside)
    yield inside
    os.chdir(before)
    assert (tmp_path / "precious").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "work"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_FILES = {
    "bomb": BOMB.encode(),
    "merge bomb": b"a: &a {x: 1}\nb: {<<: *a}\n",
    "python tag": b"hidden_size: !!python/object/apply:os.system ['touch ../owned']\n",
    "python name": b"hidden_size: !!python/name:os.system\n",
    "own tag": b"hidden_size: !wide 64\n",
    "deep lists": b"a: " + b"[" * 5000 + b"]" * 5000,
    "deep mappings": b"{a: " * 3000 + b"}" * 3000,
    "deep indent": "".join(" " * n + "a:\n" for n in range(900)).encode(),
    "several documents": b"archcompass: 1\n---\narchcompass: 1\n",
    "too large": b"0" * (MAX_FILE_BYTES + 1),
    "long": b"".join(b"k%d: 1\n" % n for n in range(100_000)),
    "a number": b"7",
    "huge number": b"archcompass: " + b"9" * 6000,
    "base sixty": b"archcompass: 1\nhidden_size: 1:30:00\n",
    "time": b"archcompass: 1\nhidden_size: 2026-11-21\n",
    "impossible time": b"archcompass: 2026-99-99\n",
    "odd keys": b"? [1, 2]\n: 3\n",
    "set": b"!!set {a, b}\n",
    "binary tag": b"name: !!binary gIGC\n",
    "utf-16": MODEL.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf- 1",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("content", HOSTILE_FILES.values(), ids=HOSTILE_FILES)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_hostile_file_is_refused_in_one_line_and_at_once(cli: Cli, place: Path, content: bytes, suffix: str) -> None:
    (place / f"model.{suffix}").write_bytes(content)
    start = time.process_time()
    assert cli("profile", f"model.{suffix}", "--gpu", "l4").code == 2
    assert cli("recommend", f"model.{suffix}").code == 2
    assert time.process_time() - start < 4
    assert sorted(path.name for path in place.iterdir()) == [f"model.{suffix}"]


def test_a_gigabyte_of_zeros_is_not_read(cli: Cli, place: Path) -> None:
    with (place / "model.yaml").open("wb") as file:
        file.truncate(2**30)
    assert "1,073,741,824 bytes" in cli("profile", "model.yaml", "--gpu", "l4").err


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "-1", "0", "1e30", "0.5", "[1]", "''"])
@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_attention_heads", "intermediate_size"])
def test_sizes_that_are_no_sizes_are_named(cli: Cli, place: Path, field: str, value: str) -> None:
    lines = MODEL.replace("{", "\n    ").replace("}", "").replace(", ", "\n    ").splitlines()
    changed = [f"{line.partition(':')[0]}: {value}" if line.strip().startswith(f"{field}:") else line for line in lines]
    (place / "model.yaml").write_text("\n".join(changed))
    done = cli("profile", "model.yaml", "--gpu", "l4")
    assert done.code == 2
    assert field in done.err


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_multipliers_that_are_no_numbers_are_refused(place: Path, value: str) -> None:
    data = yaml.safe_load(MODEL) | {"logit_multiplier": float(value.replace(".", ""))}
    with pytest.raises(InputError, match="logit_multiplier"):
        parse(data)


@pytest.mark.parametrize("size", [10**9, 10**15, 10**300])
def test_a_model_of_absurd_size_is_counted_and_does_not_fit(cli: Cli, place: Path, size: int) -> None:
    (place / "model.yaml").write_text(MODEL.replace("hidden_size: 64", f"hidden_size: {size}"))
    done = cli("profile", "model.yaml", "--gpu", "l4")
    assert done.code in (1, 2)
    assert "Traceback" not in done.err


def test_a_name_that_moves_a_terminal_is_refused(cli: Cli, place: Path) -> None:
    with pytest.raises(InputError, match="cannot be printed"):
        parse(yaml.safe_load(MODEL) | {"name": f"x{ESCAPES}"})
    (place / "model.yaml").write_text(MODEL.replace("small", json.dumps(f"x{ESCAPES}")))
    assert "name" in cli("profile", "model.yaml", "--gpu", "l4").err


MARKUP = [
    "[bold]x[/bold]",
    "[/]",
    "[/nothing]",
    "[link=http://x]y",
    "<script>alert(1)</script>",
    "`x` | y",
    "../../etc",
]


@pytest.mark.parametrize("name", MARKUP)
@pytest.mark.parametrize("markdown", [[], ["--markdown"]], ids=["plain", "markdown"])
def test_a_name_is_shown_as_it_is_written(cli: Cli, place: Path, name: str, markdown: list[str]) -> None:
    (place / "model.yaml").write_text(MODEL.replace("small", json.dumps(name)))
    done = cli("profile", "model.yaml", "--gpu", "l4", *markdown)
    assert done.code == 0
    assert name in done.out
    assert cli("verify", "model.yaml").out.count(name) == 1
    assert load(place / "model.yaml").name == name


@pytest.mark.parametrize("folder", [f"x{ESCAPES}", "[bold] [nothing]", "$(touch owned)", "-rf", "..."])
def test_a_folder_may_be_called_anything(cli: Cli, place: Path, folder: str) -> None:
    (place / folder).mkdir()
    (place / folder / "config.json").write_text(json.dumps(llama()))
    target = f"./{folder}"
    assert cli("profile", target, "--gpu", "l4").code == 0
    assert cli("convert", target, "model.yaml").code == 0
    assert cli("export", target, f"{target}/out", "--to", "vllm").code == 0
    assert cli("profile", f"{target}/no.yaml", "--gpu", "l4").code == 2
    assert load(place / "model.yaml").name.isprintable()
    assert not (place / "owned").exists()


def test_a_report_of_somebody_else_reaches_neither_terminal_nor_page_raw(cli: Cli, place: Path) -> None:
    from archcompass.advisor.pictures import gather
    from archcompass.advisor.recommend import recommend
    from archcompass.advisor.workload import Workload

    workload = Workload(context="8k", gpu="l4")
    answer = recommend(workload)
    report = {
        "recommendation": answer.model_dump(mode="json"),
        "pictures": gather(workload, answer),
        "versions": {"archcompass": "1"},
    }
    evil = f"</script><script>alert(1)</script>{ESCAPES}[/bold]"
    (place / "a.json").write_text(json.dumps(report))
    (place / "b.json").write_text(json.dumps(_replaced(report, evil)))
    for form in ([], ["--markdown"], ["--json"]):
        assert "u001b" in cli("diff", "a.json", "b.json", *form).out
    assert cli("report", "b.json", "-o", "page.html").code == 0
    page = (place / "page.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page


@pytest.mark.parametrize("key", ["recommendation", "pictures", "versions"])
def test_a_report_that_lacks_something_is_refused(cli: Cli, place: Path, key: str) -> None:
    whole = {"recommendation": {"candidates": [], "workload": {}}, "pictures": {}, "versions": {}}
    for value in (None, [], {}, "x", 7):
        (place / "report.json").write_text(json.dumps(whole | {key: value}))
        assert cli("report", "report.json").code == 2
        assert cli("diff", "report.json", "report.json").code == 2
    assert [path.name for path in place.iterdir()] == ["report.json"]


def _replaced(data: Any, evil: str) -> Any:
    """Every sentence and name of an answer, but for the words that other keys are looked up by, ends in `evil`."""
    if isinstance(data, dict):
        return {
            key: value + evil
            if isinstance(value, str) and key in ("name", "reason", "change", "text", "why", "source")
            else _replaced(value, evil)
            for key, value in data.items()
        }
    return [_replaced(entry, evil) for entry in data] if isinstance(data, list) else data


def llama(**more: Any) -> dict[str, Any]:
    """A small llama's configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        **more,
    }


def test_code_beside_a_configuration_is_never_run(cli: Cli, place: Path) -> None:
    code = "import pathlib\npathlib.Path('owned').write_text('x')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "torch.py", "archcompass.py"):
        (place / name).write_text(code)
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (place / "config.json").write_text(json.dumps(llama(auto_map=auto, trust_remote_code=True)))
    assert cli("profile", ".", "--gpu", "l4").code in (0, 2)
    assert cli("verify", ".").code in (0, 2)
    (place / "config.json").write_text(json.dumps(llama(model_type="evil", auto_map=auto)))
    assert "evil" in cli("profile", ".", "--gpu", "l4").err
    assert not (place / "owned").exists()


BAD_CONFIGS: dict[str, Any] = {
    "list": [1],
    "path in model_type": llama(model_type="../../evil"),
    "dotted model_type": llama(model_type="os.path"),
    "model_type no word": llama(model_type=["llama"]),
    "nan": llama(rms_norm_eps=float("nan")),
    "infinite": llama(hidden_size=float("inf")),
    "negative": llama(num_hidden_layers=-1),
    "endless": llama(num_hidden_layers=10**12),
    "text": llama(hidden_size="64"),
    "null": llama(num_attention_heads=None),
    "nested": llama(rope_scaling={"rope_type": {"a": [1]}}),
    "quantised with code": llama(model_type="llama\x1b[31m"),
}


@pytest.mark.parametrize("config", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_that_makes_no_sense_is_refused(cli: Cli, place: Path, config: Any) -> None:
    (place / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    assert cli("profile", "config.json", "--gpu", "l4").code == 2
    assert time.process_time() - start < 2


def safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def _lying_headers() -> dict[str, bytes]:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

    def header(**entries: Any) -> bytes:
        return json.dumps(entries).encode()

    return {
        "empty": b"",
        "short": b"\x08",
        "length beyond the file": safetensors(header(a=one), bytes(16), length=2**40),
        "length of all": safetensors(header(a=one), bytes(16), length=2**64 - 1),
        "no json": safetensors(b"{" * 64, bytes(16)),
        "deep json": safetensors(b'{"a":' * 20_000, bytes(16)),
        "offsets beyond": safetensors(header(a=one | {"data_offsets": [0, 10**12]}), bytes(16)),
        "offsets backwards": safetensors(header(a=one | {"data_offsets": [16, 0]}), bytes(16)),
        "overlap": safetensors(header(a=one, b=one), bytes(16)),
        "shape lies": safetensors(header(a=one | {"shape": [2**31, 2**31]}), bytes(16)),
        "negative shape": safetensors(header(a=one | {"shape": [-4]}), bytes(16)),
        "unknown type": safetensors(header(a=one | {"dtype": "PICKLE"}), bytes(16)),
        "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "other names": safetensors(header(a=one), bytes(16)),
    }


@pytest.mark.parametrize("content", _lying_headers().values(), ids=_lying_headers())
def test_weights_whose_header_lies_are_refused(place: Path, content: bytes) -> None:
    from archcompass.blocks.hf.checkpoint import load_pretrained

    (place / "config.json").write_text(json.dumps(llama()))
    (place / "model.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError):
        load_pretrained(place)


OUTSIDE = [
    "../precious",
    "../precious.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "model.bin",
    "",
    ".",
    "a\0b",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_points_elsewhere_is_refused(place: Path, name: str) -> None:
    from archcompass.blocks.hf.checkpoint import load_pretrained

    (place / "config.json").write_text(json.dumps(llama()))
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(FileFormatError):
        load_pretrained(place)


def test_a_pickled_checkpoint_is_never_opened(place: Path) -> None:
    from archcompass.blocks.hf.checkpoint import load_pretrained

    (place / "config.json").write_text(json.dumps(llama()))
    (place / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(FileFormatError, match="no safetensors"):
        load_pretrained(place)
    assert not (place / "owned").exists()


def test_a_written_file_replaces_a_link_and_not_what_it_points_to(place: Path) -> None:
    (place / "model.yaml").symlink_to(place.parent / "precious")
    write_text(place / "model.yaml", to_yaml(published("llama-3.1-8b")))
    assert not (place / "model.yaml").is_symlink()
    assert load(place / "model.yaml") == published("llama-3.1-8b")


def test_a_write_that_fails_leaves_the_old_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(place / "model.yaml", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileFormatError, match="No space left"):
        write_text(place / "model.yaml", "new")
    assert (place / "model.yaml").read_text() == "old"
    assert [path.name for path in place.iterdir()] == ["model.yaml"]


def test_the_command_that_a_report_suggests_is_safe_to_paste(cli: Cli, place: Path) -> None:
    (place / "a b; touch owned.yaml").write_text(MODEL)
    done = cli("profile", "a b; touch owned.yaml", "--gpu", "l4", "--json")
    assert shlex.split(json.loads(done.out)["check"])[:3] == ["archcompass", "profile", "a b; touch owned.yaml"]
    spec = parse(yaml.safe_load(MODEL) | {"name": "$(touch owned)"})
    assert shlex.split(profile(spec, gpu="l4").check)[2] == "$(touch owned)"


WRITERS = {
    "convert": ("convert", "llama-3.1-8b", "DIR/model.yaml"),
    "convert to hf": ("convert", "llama-3.1-8b", "DIR/sub"),
    "export": ("export", "llama-3.1-8b", "DIR/sub"),
    "schema": ("schema", "-o", "DIR/schema.json"),
    "report": ("report", "report.json", "-o", "DIR/page.html"),
    "train": ("train", "MODEL", "--data", "text.txt", "--steps", "1", "--sequence", "8", "-o", "DIR/sub"),
}


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("obstacle", ["a file in the way", "a folder of the system"])
def test_a_place_that_cannot_be_written_to_is_named(
    cli: Cli, place: Path, command: tuple[str, ...], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archcompass.advisor.report.html.page", lambda *_: "a page")
    (place / "report.json").write_text('{"recommendation": {}}')
    (place / "text.txt").write_text("text " * 100)
    (place / "model.yaml").write_text(MODEL.replace("128\nlayers", "256\nlayers"))
    (place / "file").write_text("x")
    folder = "file" if obstacle == "a file in the way" else "/proc/nothing"
    words = [word.replace("DIR", folder).replace("MODEL", "model.yaml") for word in command]
    done = cli(*words)
    assert done.code == 2, done.err
    assert folder in done.err
    assert (place / "file").read_text() == "x"


def test_advise_looks_at_its_folder_before_it_measures(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("x")
    monkeypatch.setattr("archcompass.advisor.advise.advise", lambda *_, **__: pytest.fail("minutes were spent"))
    done = cli("advise", "--gpu", "l4", "-o", "file/out")
    assert done.code == 2
    assert "file/out cannot be made" in done.err
    assert (place / "file").read_text() == "x"


READ_ONLY = """
import os, sys
from archcompass.blocks.model.files import FileFormatError, check_folder, write_text
from pathlib import Path
if os.geteuid() == 0:
    os.setuid(65534)  # nothing is read-only for root
for write in (lambda folder: write_text(folder / "model.yaml", "text"), lambda folder: check_folder(folder / "out")):
    try:
        write(Path(sys.argv[1]))
    except FileFormatError as error:
        print(error)
"""


def test_a_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        command = [sys.executable, "-P", "-c", READ_ONLY, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [
            f"{folder}/model.yaml cannot be written: Permission denied",
            f"{folder}/out cannot be written to: {folder} is read-only for you",
        ]
        assert not list(Path(folder).iterdir())


words = st.text(st.characters(codec="utf-8", exclude_categories=[]), max_size=12)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
anything = st.recursive(
    st.one_of(numbers, words),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, source: dict[str, Any]) -> dict[str, Any]:
    """`source` with a few values at any depth replaced, removed or added."""
    data = json.loads(json.dumps(source))
    for _ in range(draw(st.integers(1, 3))):
        inside, keys = data, list(data)
        while draw(st.booleans()) and isinstance(inside, dict):
            deeper = [value for value in inside.values() if isinstance(value, dict) and value]
            if not deeper:
                break
            inside = draw(st.sampled_from(deeper))
            keys = list(inside)
        key = draw(st.sampled_from(keys) | words) if keys else draw(words)
        if draw(st.booleans()) and key in inside:
            del inside[key]
        else:
            inside[key] = draw(anything)
    return data


@FUZZ
@given(changed(dump(published("jamba-v0.1"))))
def test_any_model_file_is_read_or_refused(data: dict[str, Any]) -> None:
    try:
        spec = parse(data)
    except ArchcompassError:
        return
    else:
        assert parse(yaml.safe_load(to_yaml(spec))) == spec
        assert isinstance(spec.parameters().total, int)


@FUZZ
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArchcompassError):
        load(path)
    with pytest.raises(ArchcompassError):
        load(path.rename(tmp_path / "config.json"))


def _configs() -> list[dict[str, Any]]:
    from archcompass.blocks.hf import to_config

    return [
        to_config(published(name))
        for name in ("jamba-v0.1", "deepseek-v3", "gemma-3-1b", "falcon-h1-7b", "rwkv7-0.1b-world")
    ]


@FUZZ
@given(st.sampled_from(_configs()).flatmap(changed))
def test_any_configuration_is_read_or_refused(config: dict[str, Any]) -> None:
    from archcompass.blocks.hf import read_config

    try:
        assert isinstance(read_config(config), ModelSpec)
    except ArchcompassError:
        return


@FUZZ
@given(st.text("0123456789(*)| abm", max_size=40))
def test_any_pattern_is_expanded_or_refused(pattern: str) -> None:
    from archcompass.blocks.model.pattern import compress, expand

    try:
        layers = expand(pattern)
    except ArchcompassError:
        return
    else:
        assert expand(compress(layers)) == layers


UNITS = ["", "k", "M", "G", " MB", "GB", "GiB", "ms", " s", "x l4"]
QUANTITIES = st.builds(
    "{}{}".format, st.integers(1, 4096) | st.floats(0.1, 64.0).map(lambda x: f"{x:.3g}"), st.sampled_from(UNITS)
)
"""What may well be right, so that what is taken is looked at too."""

FLAGS = ["--context", "--gpu", "--vram", "--output", "--precision", "--ttft-ms", "--concurrency", "--breadth", "--ram"]


@FUZZ
@given(
    st.lists(
        st.tuples(st.sampled_from(FLAGS), QUANTITIES | words | st.text(string.digits + "kKmMgGbB.e-+ x", max_size=9)),
        max_size=3,
    )
)
def test_any_flags_make_a_workload_or_are_refused(flags: list[tuple[str, str]]) -> None:
    from archcompass.advisor.reading import Reading
    from archcompass.advisor.workload import Workload

    try:
        read = Workload(**{flag[2:].replace("-", "_"): value for flag, value in flags})
        Reading.of(read)
    except ArchcompassError:
        return
    assert Workload.from_mapping(yaml.safe_load(read.to_yaml())) == read


@settings(FUZZ, max_examples=RUNS // 4)
@given(st.sampled_from(["profile", "export", "train", "schema", "diff"]), st.lists(words, max_size=3))
def test_any_words_on_the_command_line_are_understood_or_refused(
    cli: Cli, place: Path, command: str, given_words: list[str]
) -> None:
    # Nothing here is a model, a report or data: whatever is typed, it ends at once with a word of help.
    typed = [word.replace("\0", "").replace("/", "") for word in given_words]
    if command == "schema":
        typed = [word for word in typed if word]
    assert cli(command, *typed).code in (0, 2)
