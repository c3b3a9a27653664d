"""A workload says what it means, in the user's units, and refuses what cannot be."""

from pathlib import Path

import pytest

from archcompass.advisor import units
from archcompass.advisor.workload import KEYS, Workload
from archcompass.errors import FileFormatError, InputError


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (4096, 4096), ("4096", 4096), ("128k", 131072), ("128 K", 131072), ("1M", 2**20), ("1.5m", 1572864),
        ("100,000 tokens", 100_000), ("100_000", 100_000), ("1e6", 1_000_000), ("20 million", 20_000_000),
        (8192.0, 8192), ("128ki", 131072),
    ],
)  # fmt: skip
def test_tokens_are_read_as_people_write_them(said: object, meant: int) -> None:
    assert units.tokens(said) == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("24", 24 * 10**9), (24, 24 * 10**9),
        (25769803776, 25769803776), ("512MiB", 512 * 2**20), ("0.5TB", 5 * 10**11), ("24G", 24 * 10**9),
    ],
)  # fmt: skip
def test_memory_is_read_as_people_write_it(said: object, meant: int) -> None:
    assert units.memory(said) == meant


@pytest.mark.parametrize(("said", "meant"), [(500, 500.0), ("500ms", 500.0), ("2 s", 2000.0), ("50us", 0.05)])
def test_times_are_read_as_people_write_them(said: object, meant: float) -> None:
    assert units.milliseconds(said) == pytest.approx(meant)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"context": 0}, "context is 0 tokens; it must lie between 1 and"),
        ({"context": -5}, "context is -5"),
        ({"context": float("nan")}, "context is nan; write a finite number"),
        ({"context": float("inf")}, "finite"),
        ({"context": "long"}, "context is 'long'"),
        ({"context": "12 bananas"}, "suffixes of tokens"),
        ({"context": [1]}, "context is '\\[1\\]'"),
        ({"breadth": "hugee"}, "breadth is 'hugee'; choose narrow, moderate, broad or encyclopedic"),
        ({"breadth": 3}, "breadth is '3'; choose"),
        ({"task": ["chat"]}, "task is"),
        ({"contxt": 4096}, "'contxt' is not a key of a workload; did you mean 'context'"),
        ({"zzz": 1}, "the keys are task"),
        ({"vram": 0}, "vram is 0; it must lie between"),
        ({"vram": "24 bananas"}, "units of memory"),
        ({"vram": "900PB"}, "units of memory"),
        ({"concurrency": True}, "concurrency is 'True'; write a number"),
        ({"concurrency": 1.5}, "nearest: 2"),
        ({"context": "1.1"}, "whole number; nearest: 1"),
        ({"concurrency": 0}, "between 1 and"),
        ({"tokens_per_second": "fast"}, "tokens_per_second is 'fast'"),
        ({"tokens_per_second": "5ms"}, "without a unit"),
        ({"ttft_ms": -1}, "ttft_ms is -1"),
        ({"ttft_ms": "3 years"}, "units of time"),
        ({"precision": "int3"}, "did you mean 'int8'"),
        ({"stream": "maybe"}, "write true or false"),
        ({"gpu": ""}, "write a card's name"),
        ({"gpu": 7}, "write a card's name"),
        ({"output": "1e30"}, "output is 1e"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(bad: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        Workload(**bad)
    assert "\n" not in str(caught.value)


def test_words_are_read_in_any_case_and_with_any_dash() -> None:
    work = Workload(task="Forecast", modality="time_series", precision="Q4_K_M", mode=" Training ")
    assert (work.modality, work.precision, work.mode) == ("time-series", "q4_k_m", "training")


def test_every_key_has_a_default_with_a_reason() -> None:
    work = Workload()
    assert set(work.defaulted) == set(KEYS)
    assert all(default.reason for default in work.defaulted.values())
    assert work.given == {}


def test_what_was_given_is_told_from_what_was_assumed() -> None:
    work = Workload(context="128k", gpu=None)
    assert work.given == {"context": 131072}
    assert "gpu" in work.defaulted
    assert "context" not in work.defaulted


@pytest.mark.parametrize("said", ["unbounded", "Endless", "infinite"])
def test_a_stream_and_an_unbounded_context_mean_each_other(said: str) -> None:
    assert Workload(context=said).stream
    assert Workload(stream="yes").unbounded


@pytest.mark.parametrize("key", ["context", "breadth", "vram", "concurrency"])
def test_no_default_leans_on_how_much_work_there_is(key: str) -> None:
    few, many = {"context": (512, 2**20), "breadth": ("narrow", "encyclopedic")}.get(key, (1, 1000))
    one, other = Workload(**{key: few}), Workload(**{key: many})
    assert {k: d.value for k, d in one.defaulted.items()} == {k: d.value for k, d in other.defaulted.items()}


def test_a_workload_survives_its_own_yaml(tmp_path: Path) -> None:
    work = Workload(
        context="1.5M", vram="24GiB", ram=64_000_000_001, task="rag", stream=False, ttft_ms="50us", gpu="2x H100"
    )
    path = tmp_path / "workload.yaml"
    path.write_text("archcompass: 1\n" + work.to_yaml())
    again = Workload.from_file(path)
    assert again == work
    assert again.given == work.given


def test_a_change_leaves_what_was_assumed_alone() -> None:
    changed = Workload(gpu="l4").replace(task="reason")
    assert changed.output == Workload().output
    assert set(changed.given) == {"gpu", "task"}


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "just words", "context: !!python/object:os.system 1", "a: &x 1\nb: *x"]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"odd\.yaml"):
        Workload.from_file(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read"):
        Workload.from_file(tmp_path / "none.yaml")


def test_a_bad_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("breadth: wide\n")
    with pytest.raises(InputError, match=r"^w\.yaml: breadth is 'wide'.*did you mean 'broad'"):
        Workload.from_file(path)


@pytest.mark.parametrize(
    ("size", "said"), [(20.9e9, "20.9 GB"), (412.0, "412 B"), (1.5e6, "1.5 MB"), (450e9, "450 GB"), (3e12, "3 TB")]
)
def test_bytes_are_said_in_the_units_cards_are_sold_in(size: float, said: str) -> None:
    assert units.say_bytes(size) == said


@pytest.mark.parametrize(
    ("count", "said"), [(131072, "128k"), (2**20, "1M"), (4352, "4,352"), ("unbounded", "unbounded")]
)
def test_tokens_are_said_as_they_are_asked(count: int | str, said: str) -> None:
    assert units.say_tokens(count) == said


@pytest.mark.parametrize(
    ("count", "said"), [(31.2e9, "31B"), (3.4e9, "3.4B"), (350e6, "350M"), (3.02e9, "3B"), (999, "999")]
)
def test_parameters_are_said_as_models_are_named(count: float, said: str) -> None:
    assert units.say_count(count) == said


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (0.0, "0 ms"),
        (0.05, "50 µs"),
        (340.0, "340 ms"),
        (999.9, "1 s"),
        (9800.0, "9.8 s"),
        (126e3, "2.1 min"),
        (9e6, "2.5 h"),
    ],
)
def test_times_are_said_in_three_figures(ms: float, said: str) -> None:
    assert units.say_ms(ms) == said


def test_a_range_says_its_unit_once() -> None:
    assert units.say_spread("9.8 s", "3.1 s") == "9.8 s ±3.1"
    assert units.say_spread("1.1 s", "758 ms") == "1.1 s ±758 ms"
