"""Operators: those of the GPU on meta (shapes, gradients, FLOPs; no kernel runs), those of the CPU by torch's own check."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archcompass.kernels.attention import attention_cost, latent_attention_cost, sparse_attention_cost
from archcompass.kernels.attention.pieces import Visibility
from archcompass.kernels.cross_entropy import linear_cross_entropy_cost
from archcompass.kernels.moe import moe_cost
from archcompass.kernels.moe.activations import Activation, Experts

pytest.importorskip("triton")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, learn: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=learn)


def flops_of(call: Any, inputs: list[Tensor]) -> tuple[Any, int, int]:
    """The result, and FLOPs of forward and backward; gradients must have the shapes of what they are of."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    forward = counter.get_total_flops()
    out = result[0] if isinstance(result, tuple) else result
    with FlopCounterMode(display=False) as counter:
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    return result, forward, counter.get_total_flops()


def test_attention_counts_visible_pairs_and_seven_products_for_two() -> None:
    from archcompass.kernels.attention.triton_op import attention_triton

    q, k, v, sinks = meta(2, 30, 6, 16), meta(2, 40, 2, 16), meta(2, 40, 2, 8), meta(6)
    see = Visibility(True, 7, None, 0, 0.25, None)
    inputs = [q, k, v, sinks]
    (out, lse), forward, backward = flops_of(lambda: attention_triton(*inputs, None, None, see), inputs)
    assert out.shape == (2, 30, 6, 8)
    assert lse.shape == (2, 30, 6)
    assert lse.dtype == torch.float32
    sizes = {"batch": 2, "new_tokens": 30, "keys": 40, "heads": 6, "kv_heads": 2, "key_dim": 16, "value_dim": 8}
    assert forward == attention_cost(**sizes, window=7, element_bytes=2).flops
    assert backward == forward * 7 // 2


def test_latents_are_scored_twice_again_and_are_key_and_value_at_once() -> None:
    from archcompass.kernels.attention.triton_op import latent_triton

    q, latents = meta(2, 30, 6, 20), meta(2, 40, 20)
    out, forward, backward = flops_of(lambda: latent_triton(q, latents, None, 16, 0.25), [q, latents])
    assert out.shape == (2, 30, 6, 16)
    sizes = {"batch": 2, "new_tokens": 30, "keys": 40, "heads": 6, "rank": 16, "rope_dim": 4, "element_bytes": 2}
    assert forward == latent_attention_cost(**sizes).flops
    assert backward * (20 + 16) == forward * (4 * 20 + 3 * 16)


def test_chosen_blocks_count_whole_and_the_log_sum_exp_has_a_gradient() -> None:
    from archcompass.kernels.attention.triton_op import sparse_triton

    q, k, v = meta(2, 30, 6, 16), meta(2, 40, 2, 16), meta(2, 40, 2, 8)
    blocks = torch.zeros(2, 30, 2, 3, dtype=torch.int64, device="meta")
    (out, lse), forward, backward = flops_of(lambda: sparse_triton(q, k, v, blocks, 16, 0.25), [q, k, v])
    assert out.shape == (2, 30, 6, 8)
    assert lse.shape == (2, 30, 6)
    assert lse.requires_grad
    sizes = {"batch": 2, "new_tokens": 30, "heads": 6, "kv_heads": 2, "key_dim": 16, "value_dim": 8}
    assert forward == sparse_attention_cost(**sizes, slots=3, block_size=16, element_bytes=2).flops
    assert backward * (16 + 8) == forward * (4 * 16 + 3 * 8)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_count_their_chosen_rows(gated: bool) -> None:
    from archcompass.kernels.moe.triton_moe import moe_triton

    x, weights, gate_up, down = meta(9, 16), meta(9, 3), meta(5, 48 if gated else 24, 16), meta(5, 16, 24)
    chosen = torch.empty(9, 3, dtype=torch.int64, device="meta")
    activation = Activation("silu", gated)
    y, forward, backward = flops_of(
        lambda: moe_triton(x, weights, chosen, Experts(gate_up, down, None, None, activation, False)),
        [x, weights, gate_up, down],
    )
    assert y.shape == (9, 16)
    assert (
        forward
        == moe_cost(tokens=9, hidden=16, intermediate=24, experts=5, top_k=3, gated=gated, element_bytes=2).flops
    )
    product = 2 * 9 * 3 * 16 * 24
    assert backward == product * (8 if gated else 5)


def test_the_fused_loss_computes_its_logits_twice() -> None:
    from archcompass.kernels.cross_entropy.triton_op import losses_triton

    hidden, weight, targets = meta(9, 16), meta(50, 16), torch.zeros(9, dtype=torch.int64, device="meta")
    losses, forward, backward = flops_of(
        lambda: losses_triton(hidden, weight, targets, -100, None, 1.0, 4), [hidden, weight]
    )
    assert losses.shape == (9,)
    assert losses.dtype == torch.float32
    sizes = {"tokens": 9, "width": 16, "vocab": 50, "element_bytes": 2}
    assert forward == linear_cross_entropy_cost(**sizes, training=False).flops
    assert backward == 3 * forward


def test_rope_keeps_its_shape_and_multiplies_nothing() -> None:
    from archcompass.kernels.rope.triton_rope import rotate_triton

    x, table = meta(2, 7, 3, 20), meta(7, 5, dtype=torch.float32, learn=False)
    y, forward, backward = flops_of(lambda: rotate_triton(x, table, table, True), [x])
    assert y.shape == x.shape
    assert forward == backward == 0


@pytest.mark.parametrize("name", ["attention_pieces", "moe_grouped", "linear_cross_entropy_gradients"])
def test_the_operators_of_the_cpu_keep_torch_s_rules(name: str) -> None:
    import archcompass.kernels.attention.torch_op
    import archcompass.kernels.cross_entropy.chunked
    import archcompass.kernels.moe.grouped  # noqa: F401

    torch.manual_seed(0)
    f64 = {"dtype": torch.float64}
    learning = {**f64, "requires_grad": True}
    q, k = torch.randn(1, 5, 2, 4, **learning), torch.randn(1, 9, 1, 4, **learning)
    x, gate_up, down = torch.randn(3, 4, **learning), torch.randn(5, 6, 4, **learning), torch.randn(5, 4, 3, **learning)
    chosen, targets = torch.tensor([[0, 2], [1, 0], [4, 2]]), torch.tensor([1, 0, -100])
    arguments = {
        "attention_pieces": (q, k, k.detach(), None, None, None, True, 3, None, 0, 0.5, None),
        "moe_grouped": (
            x, torch.rand(3, 2, **f64), chosen, gate_up, down, None, None, "silu", True, 1.0, None, 0.0, False, True,
        ),
        "linear_cross_entropy_gradients": (x, down[:, :, 0], targets, torch.ones(3, **f64), -100, None, 1.0, 2),
    }  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.archcompass, name), arguments[name], test_utils=checks)
