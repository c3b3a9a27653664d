"""Tile tables: what is picked for which device and shape, and how many variants there can be."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from archcompass.kernels.tiles import Row, Table, Tile, assume, capability, next_power_of_two

FOLDERS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/tiles.py"))
MOST_ROWS = 16

SMALL, LARGE = Tile({"BLOCK": 32}), Tile({"BLOCK": 128}, warps=8, stages=3)
TABLE = Table("example", (Row(LARGE, upto={"key_dim": 128}, shared_kib=128), Row(SMALL)))


@pytest.mark.parametrize(
    ("device", "key_dim", "tile"),
    [(90, 128, LARGE), (80, 64, LARGE), (86, 64, SMALL), (120, 64, SMALL), (90, 256, SMALL), (75, 64, SMALL)],
)
def test_the_fastest_tile_that_fits_is_picked(device, key_dim, tile):
    with assume(device):
        assert TABLE.pick(torch.device("meta"), key_dim=key_dim) is tile


def test_a_launch_names_blocks_warps_and_stages():
    assert LARGE.launch() == {"BLOCK": 128, "num_warps": 8, "num_stages": 3}


def test_an_assumption_ends_with_its_block():
    with assume(120):
        assert capability(torch.device("cpu")) == 120
    assert capability(torch.device("cpu")) == 80


@pytest.mark.parametrize(
    "row", [Row(SMALL, upto={"key_dim": 64}), Row(SMALL, shared_kib=99), Row(SMALL, capabilities=(90, 120))]
)
def test_the_last_row_must_suit_everything(row):
    with pytest.raises(ValueError, match="must suit every device and shape"):
        Table("example", (row,))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_table_is_short(folder):
    module = import_module(f"archcompass.kernels.{folder}.tiles")
    tables = [x for x in vars(module).values() if isinstance(x, Table)]
    assert tables
    assert all(len(table.rows) <= MOST_ROWS for table in tables)


@pytest.mark.parametrize(("value", "power"), [(1, 16), (16, 16), (17, 32), (100, 128), (128, 128)])
def test_powers_of_two_cover_and_suit_tensor_cores(value, power):
    assert next_power_of_two(value) == power
