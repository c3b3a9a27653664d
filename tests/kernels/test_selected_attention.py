"""Attention over selected keys: against its definition, against full attention, and its gradient."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archcompass.errors import InputError
from archcompass.kernels.attention import attention
from archcompass.kernels.selected_attention import op, selected_attention, selected_attention_cost


def inputs(heads: int = 6, kv_heads: int = 2, slots: int = 5, time: int = 7, keys: int = 11):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    q = torch.randn(2, time, heads, 8, dtype=torch.float64)
    k = torch.randn(2, keys, kv_heads, 8, dtype=torch.float64)
    v = torch.randn(2, keys, kv_heads, 6, dtype=torch.float64)
    index = torch.rand(2, time, kv_heads, keys).topk(slots, -1).indices
    counts = torch.rand(index.shape) < 0.7
    counts[0, 0] = False
    return q, k, v, index, counts


@pytest.mark.parametrize("gathered", [1, 2**23])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_the_torch_path_is_the_definition(
    heads: int, kv_heads: int, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "GATHERED_ELEMENTS", gathered)
    case = inputs(heads, kv_heads)
    out, weights = selected_attention(*case, scale=0.3)
    expected, expected_weights = selected_attention(*case, scale=0.3, backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert not out[0, 0].any()


def test_with_every_visible_key_selected_it_is_attention() -> None:
    q, k, v, *_ = inputs(time=11)
    index = torch.arange(11).expand(2, 11, 2, 11)
    counts = (index <= torch.arange(11).view(1, 11, 1, 1)).contiguous()
    torch.testing.assert_close(selected_attention(q, k, v, index, counts)[0], attention(q, k, v))


def test_gradients_are_right() -> None:
    q, k, v, index, counts = inputs()
    floats = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: selected_attention(*x, index, counts)[0], floats)


def test_flops_are_those_torch_counts() -> None:
    case = [x.to("meta") for x in inputs()]
    with FlopCounterMode(display=False) as counter:
        selected_attention(*case)
    cost = selected_attention_cost(
        batch=2, new_tokens=7, slots=5, heads=6, kv_heads=2, key_dim=8, value_dim=6, element_bytes=4
    )
    assert cost.flops == counter.get_total_flops()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    q, k, v, index, counts = inputs()
    with pytest.raises(InputError, match="index"):
        selected_attention(q, k, v, index[:, :3], counts[:, :3])
    with pytest.raises(InputError, match="divide"):
        selected_attention(q[:, :, :5], k, v, index, counts)
    with pytest.raises(InputError, match="as wide"):
        selected_attention(q[..., :4], k, v, index, counts)
