"""Machines: the table is sound, and people find what they mean or are told what they could have meant."""

import pytest

from archcompass.errors import InputError, UnknownNameError
from archcompass.profiles import hardware
from archcompass.profiles.hardware import Hardware, describe, details, find, known, with_memory
from archcompass.profiles.units import GIB, parse_bandwidth, parse_bytes, parse_flops


def test_the_table_holds_enough_machines_of_every_kind() -> None:
    cards = known()
    assert len(cards) >= 45
    assert {"NVIDIA", "AMD", "Apple", "Intel"} <= {card.vendor for card in cards}
    assert {"datacenter", "workstation", "geforce", "edge", "apple"} <= {card.kind for card in cards}


@pytest.mark.parametrize("card", known(), ids=lambda card: card.id)
def test_every_machine_has_a_source_and_possible_figures(card: Hardware) -> None:
    assert card.source
    assert card.confidence
    assert 4 * GIB < card.memory_bytes <= card.memory_gb * 1.08e9
    assert 50e9 < card.bandwidth_bytes_per_second < 20e12
    assert card.flops["fp32"] > 1e12
    assert card.rate("bf16") <= card.rate("fp8") * 1.001
    assert card.link_bytes_per_second > 1e9


def test_rates_are_dense() -> None:
    assert find("h100-sxm").rate("bf16") == pytest.approx(989e12)
    assert find("rtx-4090").rate("bf16") == pytest.approx(165.2e12)
    assert find("b200").rate("fp8") == pytest.approx(4500e12)


def test_gigabytes_as_sold_are_not_gibibytes_as_usable() -> None:
    card = find("rtx-4090")
    assert card.memory_gb == 24
    assert card.memory_bytes == int(23.52 * GIB)


@pytest.mark.parametrize("card", known(), ids=lambda card: card.id)
def test_an_id_and_a_name_find_their_machine(card: Hardware) -> None:
    assert find(card.id).id == card.id
    assert find(card.id.upper()).id == card.id
    assert find(f"3x {card.id}").count == 3


@pytest.mark.parametrize(
    ("written", "meant", "count"),
    [
        ("4090", "rtx-4090", 1),
        ("RTX 4090", "rtx-4090", 1),
        ("rtx4090", "rtx-4090", 1),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 1),
        ("2x H100 SXM 80GB", "h100-sxm", 2),
        ("8 x h100-sxm", "h100-sxm", 8),
        ("2× rtx 4090", "rtx-4090", 2),
        ("rtx 3090 x2", "rtx-3090", 2),
        ("3090", "rtx-3090", 1),
        ("3090ti", "rtx-3090-ti", 1),
        ("RTX PRO 6000", "rtx-pro-6000", 1),
        ("NVIDIA H100 80GB HBM3", "h100-sxm", 1),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80", 1),
        ("MI300X", "mi300x", 1),
        ("9070 XT", "rx-9070-xt", 1),
        ("Apple M4", "m4-10c", 1),
        ("m3 ultra 512GB", "m3-ultra-80c", 1),
        ("DGX Spark", "gb10", 1),
        ("4070 ti super", "rtx-4070-ti-super", 1),
        ("H100", "h100-sxm", 1),
        ("8x H100 80GB", "h100-sxm", 8),
        ("A100 80GB", "a100-sxm-80", 1),
        ("7900xtx", "rx-7900-xtx", 1),
        ("MacBook Pro M4 Max", "m4-max-40c", 1),
        ("4090 x2", "rtx-4090", 2),
        ("4090x2", "rtx-4090", 2),
        ("4090 x 2", "rtx-4090", 2),
        ("2 RTX 3090", "rtx-3090", 2),
        ("8x H100 NVLink", "h100-sxm", 8),
        ("H 100", "h100-sxm", 1),
        ("4080 super", "rtx-4080-super", 1),
        ("RTX PRO 6000 Max-Q", "rtx-pro-6000", 1),
    ],
)
def test_machines_are_found_as_people_write_them(written: str, meant: str, count: int) -> None:
    found = find(written)
    assert (found.id, found.count) == (meant, count)
    assert find(found.tag) == found


@pytest.mark.parametrize(
    ("written", "nearest"),
    [("A100", "a100-sxm-80"), ("v100", "v100-sxm2-32"), ("rtx 6000", "rtx-6000-ada"), ("4060 ti", "rtx-4060-ti-8"),
     ("rtx-4099", "rtx-4090"), ("h100 64gb", "h100-sxm"), ("mi300", "mi300x"),
     ("H10O", "h100-sxm"), ("gtx 1080", "rtx-5080"), ("4090 laptop", "rtx-4090"), ("H100 MIG 3g.40gb", "h100-sxm"),
     ("Jetson Nano", "orin-nano-8"), ("RTX 4900", "rtx-4090")],
)  # fmt: skip
def test_what_is_ambiguous_or_unknown_is_refused_with_the_nearest(written: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as refused:
        find(written)
    assert nearest in refused.value.nearest
    assert nearest in str(refused.value)


@pytest.mark.parametrize("written", ["", "banana", "x", "2x", "🦙", "a" * 300, "16", "blackwell", "arc", "rtx"])
def test_nonsense_is_refused_in_one_line(written: str) -> None:
    with pytest.raises(InputError) as refused:
        find(written)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("written", ["0x 4090", "2000x 4090", "2x cpu"])
def test_impossible_counts_are_refused(written: str) -> None:
    with pytest.raises(InputError):
        find(written)


def test_the_processor_of_this_machine_is_a_machine() -> None:
    cpu = find("cpu")
    assert cpu.is_cpu
    assert cpu.memory_bytes > GIB
    assert cpu.rate("fp16") > 0


def test_a_dtype_without_a_unit_computes_in_the_next_wider_one() -> None:
    volta, ampere = find("v100-sxm2-32"), find("a100-sxm-80")
    assert volta.rate("bf16") == volta.rate("fp16")
    assert ampere.rate("fp8") == ampere.rate("bf16")


def test_a_machine_can_be_described_by_hand() -> None:
    card = describe(vram="24GB", bandwidth="1008GB/s", tflops=165)
    assert (card.memory_bytes, card.bandwidth_bytes_per_second, card.rate("bf16")) == (24 * 10**9, 1008e9, 165e12)
    assert with_memory(find("rtx-4090"), 48e9).memory_bytes == 48 * 10**9


@pytest.mark.parametrize(
    "written", ["24GB 1008GB/s 165TFLOPS", "24 GB, 1.008 TB/s, 165 tflops", "24GB 1008GB/s 0.165PFLOPS"]
)
def test_a_description_is_a_name(written: str) -> None:
    assert find(written) == describe(vram="24GB", bandwidth="1008GB/s", tflops=165)
    assert find(find(f"2x {written}").tag).count == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"vram": "0GB"},
        {"vram": "24 bananas"},
        {"bandwidth": "fast"},
        {"tflops": -1},
        {"vram": float("nan")},
        {"count": 0},
    ],
)
def test_an_impossible_description_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(InputError):
        describe(**({"vram": "24GB", "bandwidth": "1TB/s", "tflops": "100"} | flags))  # type: ignore[arg-type]


def test_units_are_read_as_written() -> None:
    assert parse_bytes("24GB") == 24_000_000_000
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("24 gib") == parse_bytes("24GiB")
    assert parse_bytes(24) == 24_000_000_000
    assert parse_bytes(25_250_627_584) == 25_250_627_584
    assert parse_bandwidth("3.35TB/s") == pytest.approx(3.35e12)
    assert parse_bandwidth(1008) == pytest.approx(1.008e12)
    assert parse_flops("1.3 PFLOPS") == pytest.approx(1.3e15)


def test_the_whole_entry_can_be_read() -> None:
    assert details("rtx-4090")["memory_type"].startswith("GDDR6X")
    assert hardware.find("rtx-4090").release_year == 2022
