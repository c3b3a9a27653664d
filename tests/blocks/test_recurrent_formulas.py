"""Recurrent blocks against their papers' formulas, written out token by token or as one square matrix."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archcompass.blocks.base import TINY_WIDTH, Block
from archcompass.blocks.delta_net.spec import DeltaNet
from archcompass.blocks.gla.spec import GLA
from archcompass.blocks.lightning.spec import Lightning
from archcompass.blocks.linear_attention.module import FEATURE_MAPS
from archcompass.blocks.linear_attention.spec import LinearAttention
from archcompass.blocks.rg_lru.spec import RGLRU
from archcompass.blocks.runtime import BlockModule, Context, initialise
from archcompass.blocks.rwkv4.spec import RWKV4TimeMix
from archcompass.blocks.rwkv7.spec import RWKV7TimeMix
from archcompass.errors import SpecError

TIME = 37


def build(spec: Block, layer: int = 0) -> BlockModule:
    torch.manual_seed(0)
    module = spec.build(TINY_WIDTH, layer).double()
    initialise(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.eval()


def sample() -> Tensor:
    return torch.randn(2, TIME, TINY_WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("spec", LinearAttention.tiny(), ids=lambda spec: spec.feature_map)
def test_linear_attention_is_attention_with_other_weights(spec: LinearAttention) -> None:
    """Σ_i w_ti v_i / Σ_i w_ti with w_ti = φ(q_t)·φ(k_i), over all i up to t."""
    module, x = build(spec), sample()
    heads = (spec.num_attention_heads, -1)
    q, k, v = (part.unflatten(-1, heads) for part in (x @ module.input.weight.T).split(spec.sections, dim=-1))
    phi = FEATURE_MAPS[spec.feature_map]
    weights = torch.einsum("bihd,bjhd->bhij", phi(q), phi(k)).tril()
    if spec.normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ module.output.weight.T
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-9, atol=1e-9)


def test_a_sum_of_weights_beyond_float16_still_divides() -> None:
    spec = LinearAttention(num_attention_heads=1, feature_dim=8, head_dim=4, feature_map="elu")
    module = build(spec)
    with torch.no_grad():
        module.input.weight[:16].mul_(20)
    x = sample().repeat(1, 60, 1)
    with torch.inference_mode():
        exact = module(x)[0]
        rounded = module.half()(x.half())[0]
    assert rounded.isfinite().all()
    assert (rounded.double() - exact).norm() < 0.05 * exact.norm()


def test_the_taylor_map_is_the_exponential_to_second_order() -> None:
    q, k = torch.randn(2, 5, 7, dtype=torch.float64)
    s = (q * k).sum(-1) / 7**0.5
    taylor = FEATURE_MAPS["taylor"]
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2)


def test_a_map_that_can_sum_to_zero_is_not_normalised() -> None:
    with pytest.raises(ValueError, match="normalise divides by a sum"):
        LinearAttention(num_attention_heads=1, feature_dim=4, head_dim=4, feature_map="identity")


@pytest.mark.parametrize("spec", GLA.tiny(), ids=["three-heads", "one-head"])
def test_gla_is_its_recurrence(spec: GLA) -> None:
    module, x = build(spec), sample()
    heads = (spec.num_attention_heads, -1)
    *parts, low_rank = (x @ module.input.weight.T).split(spec.sections, dim=-1)
    q, k, v, gate = (part.unflatten(-1, heads) for part in parts)
    alpha = (low_rank @ module.decay.weight.T + module.decay.bias).sigmoid().unflatten(-1, heads)
    alpha = alpha ** (1 / spec.gate_logit_normalizer)
    state, outputs = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=torch.float64), []
    for t in range(TIME):
        state = alpha[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * state).sum(-2) * spec.key_head_dim**-0.5)
    y = rms(torch.stack(outputs, dim=1), spec.norm_eps) * module.norm_weight * F.silu(gate)
    torch.testing.assert_close(module(x)[0], y.flatten(2) @ module.output.weight.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spec", DeltaNet.tiny(), ids=["plain", "gated"])
def test_delta_net_is_its_recurrence(spec: DeltaNet) -> None:
    """S_t = (I - β k kᵀ) S_{t-1} + β k vᵀ, with the projection matrix written out."""
    module, x = build(spec), sample()
    heads = (spec.num_attention_heads, -1)
    conved, gate, beta = (x @ module.input.weight.T).split(spec.sections, dim=-1)
    seen = F.pad(conved, (0, 0, spec.conv_kernel - 1, 0)).unfold(1, spec.conv_kernel, 1)
    conved = F.silu((seen * module.conv_weight).sum(-1))
    widths = [spec.key_width, spec.key_width, spec.value_width]
    q, k, v = (part.unflatten(-1, heads) for part in conved.split(widths, dim=-1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    beta = beta.sigmoid()[..., None, None] * (2 if spec.allow_neg_eigval else 1)
    state, outputs = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=torch.float64), []
    for t in range(TIME):
        erase = torch.eye(q.shape[-1]) - beta[:, t] * k[:, t, ..., None] * k[:, t, :, None]
        state = erase @ state + beta[:, t] * k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * state).sum(-2) * spec.key_head_dim**-0.5)
    y = rms(torch.stack(outputs, dim=1), spec.norm_eps) * module.norm_weight
    y = y * F.silu(gate.unflatten(-1, heads)) if spec.output_gate else y
    torch.testing.assert_close(module(x)[0], y.flatten(2) @ module.output.weight.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_rwkv4_is_a_softmax_over_decayed_keys_however_large_they_are(spread: float) -> None:
    """The exponents w (t-1-i) + k_i and u + k_t, through a softmax: what the three sums must amount to."""
    module, x = build(RWKV4TimeMix(attention_hidden_size=20)), sample()
    with torch.no_grad():
        module.key.weight.mul_(spread)
        shifted = F.pad(x, (0, 0, 1, -1))
        k, v, r = (
            layer(mu * x + (1 - mu) * shifted)
            for mu, layer in zip(module.mix, (module.key, module.value, module.receptance), strict=True)
        )
        age = (torch.arange(TIME)[:, None] - torch.arange(TIME) - 1).clamp(min=0)
        exponents = k[:, None] - module.decay.exp() * age[..., None]
        exponents = torch.where(torch.eye(TIME, dtype=torch.bool)[..., None], k[:, None] + module.bonus, exponents)
        future = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)[..., None]
        wkv = (exponents.masked_fill(future, -torch.inf).softmax(dim=2) * v[:, None]).sum(dim=2)
        expected = module.output(r.sigmoid() * wkv)
        whole, _ = module(x)
        state, parts = None, []
        for start, end in [(0, 1), (1, 2), (2, 20), (20, 21), (21, TIME)]:
            y, state = module(x[:, start:end], state)
            parts.append(y)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


def test_rwkv7_draws_its_values_towards_those_the_first_layer_left() -> None:
    ranks = {"decay_low_rank_dim": 5, "a_low_rank_dim": 4, "v_low_rank_dim": 3, "gate_low_rank_dim": 6}
    first = build(RWKV7TimeMix(head_dim=16, first=True, **ranks))
    later = build(RWKV7TimeMix(head_dim=16, **ranks))
    x, context = sample(), Context()
    with torch.inference_mode():
        first(x, None, context)
        drawn, _ = later(x, None, context)
        (name,) = context.shared
        torch.testing.assert_close(later(x, None, Context(shared={name: context.shared[name]}))[0], drawn)
        assert not torch.allclose(later(x, None, Context(shared={name: context.shared[name].flip(1)}))[0], drawn)


def test_rg_lru_lets_the_first_token_in_whole_and_no_later_one() -> None:
    """A second sequence after five tokens of padding starts as if it were alone; a continued one does not start again."""
    module, x = build(RGLRU(lru_width=30, num_attention_heads=3)), sample()
    padding = torch.tensor([0, 5])
    with torch.inference_mode():
        padded, _ = module(torch.cat([x[:1, :12], F.pad(x[1:, :7], (0, 0, 5, 0))]), None, Context(padding=padding))
        torch.testing.assert_close(padded[1:, 5:], module(x[1:, :7])[0])
        whole, (head, state) = module(x)[0], module(x[:, :20])
        torch.testing.assert_close(torch.cat([head, module(x[:, 20:], state)[0]], dim=1), whole)


def test_lightning_slopes_fade_from_layer_to_layer() -> None:
    spec = Lightning(num_attention_heads=4, head_dim=8, num_hidden_layers=5)
    assert spec.slopes(0) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8], rel=1e-4)
    assert spec.slopes(4) == pytest.approx([slope * 1.25e-5 for slope in spec.slopes(0)], rel=0.02)
    first, last = (build(spec, layer)(sample())[0] for layer in (0, 4))
    assert not torch.allclose(first, last)


@pytest.mark.parametrize("kind", ["rwkv6_time_mix", "rwkv7_time_mix"])
def test_heads_that_do_not_divide_the_width_are_refused(kind: str) -> None:
    from archcompass.blocks.base import block_class

    with pytest.raises(SpecError, match=r"head_dim \(24\) must divide hidden_size \(64\)"):
        block_class(kind).model_validate({"head_dim": 24}).build(TINY_WIDTH)
