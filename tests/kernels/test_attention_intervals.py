"""The stretch of keys a query sees, as the GPU kernels get it, against the mask of the formula."""

import itertools
from typing import Any

import pytest
import torch

from archcompass.kernels.attention.intervals import intervals, queries_of_key_blocks
from archcompass.kernels.attention.pieces import Visibility
from archcompass.kernels.attention.reference import attention_mask

SETTINGS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 9},
    {"chunk": 8, "key_offset": 3},
    {"chunk": 8, "window": 5},
]
PADDING = [None, torch.tensor([0, 4, 17])]


def see(causal: bool = True, window: int | None = None, chunk: int | None = None, key_offset: int = 0) -> Visibility:
    return Visibility(causal, window, chunk, key_offset, 1.0, None)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("new", "keys"), [(17, 17), (1, 17), (6, 17), (9, 4)])
def test_the_stretch_is_exactly_what_the_mask_lets_through(new: int, keys: int, settings: dict[str, Any]) -> None:
    for padding in PADDING:
        visible = attention_mask(new, keys, **settings, padding=padding)
        first, last = intervals(new, keys, see(**settings), padding, None, torch.device("cpu"))
        key = torch.arange(keys)
        assert torch.equal((key >= first[..., None]) & (key < last[..., None]), visible)
        assert (first.diff(dim=1) >= 0).all()
        assert (last.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_block_of_keys_is_seen_by_the_queries_said_and_by_no_other(settings: dict[str, Any]) -> None:
    for padding, block in itertools.product(PADDING, (4, 16)):
        first, last = intervals(11, 19, see(**settings), padding, None, torch.device("cpu"))
        begin, end = queries_of_key_blocks(first, last, 19, block)
        visible = attention_mask(11, 19, **settings, padding=padding)
        for row, index in itertools.product(range(first.shape[0]), range(begin.shape[1])):
            seers = visible[row, :, index * block : (index + 1) * block].any(-1).nonzero().flatten().tolist()
            said = list(range(int(begin[row, index]), int(end[row, index])))
            assert set(seers) <= set(said)
            assert not seers or (min(seers), max(seers)) == (said[0], said[-1])


def test_packed_sequences_end_where_they_end() -> None:
    edges = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    first, last = intervals(8, 8, see(causal=False), None, edges, torch.device("cpu"))
    assert first.tolist() == [[0, 0, 0, 3, 3, 3, 3, 3]]
    assert last.tolist() == [[3, 3, 3, 8, 8, 8, 8, 8]]
