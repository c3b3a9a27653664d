"""Recurrent blocks against the layers of transformers, with their weights: prompts, segments and single steps."""

import pytest
import torch
from torch import Tensor, nn

from archcompass.blocks.base import Block
from archcompass.blocks.gated_delta_net.spec import GatedDeltaNet
from archcompass.blocks.lightning.spec import Lightning
from archcompass.blocks.rg_lru.spec import RGLRU
from archcompass.blocks.rwkv4.spec import RWKV4ChannelMix, RWKV4TimeMix

transformers = pytest.importorskip("transformers")

WIDTH, TIME = 24, 75


def randomised(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def assert_same_layer(spec: Block, weights: dict[str, Tensor], x: Tensor, expected: Tensor, layer: int = 0) -> None:
    """Our block with these weights says `expected` of x, at once and in pieces."""
    module = spec.build(WIDTH, layer)
    module.load_state_dict(weights)
    with torch.inference_mode():
        whole, _ = module(x)
        state, parts = None, []
        for start, end in [(0, 40), (40, 41), (41, 42), (42, TIME)]:
            y, state = module(x[:, start:end], state)
            parts.append(y)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "head_dim", "layer"), [(3, 10, 0), (1, 16, 2), (4, 6, 3)])
def test_lightning_is_the_layer_of_minimax(heads: int, head_dim: int, layer: int) -> None:
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = transformers.MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=head_dim,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
        block_size=16,
    )
    theirs = randomised(MiniMaxLightningAttention(config, layer))
    named = theirs.state_dict()
    weights = {
        "qkv.weight": named["qkv_proj.weight"],
        "gate.weight": named["output_gate.weight"],
        "norm_weight": named["norm.weight"],
        "output.weight": named["out_proj.weight"],
    }
    x = torch.randn(2, TIME, WIDTH)
    with torch.inference_mode():
        expected = theirs(x, None, None)[0]
    assert_same_layer(
        Lightning(num_attention_heads=heads, head_dim=head_dim, num_hidden_layers=4), weights, x, expected, layer
    )


GDN = [
    GatedDeltaNet(num_key_heads=2, num_value_heads=6, key_head_dim=6, value_head_dim=10),
    GatedDeltaNet(num_key_heads=3, num_value_heads=3, key_head_dim=8, value_head_dim=4, conv_kernel=2),
]


def linear_fields(spec: GatedDeltaNet) -> dict[str, object]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": spec.num_key_heads,
        "linear_num_value_heads": spec.num_value_heads,
        "linear_key_head_dim": spec.key_head_dim,
        "linear_value_head_dim": spec.value_head_dim,
        "linear_conv_kernel_dim": spec.conv_kernel,
    }


@pytest.mark.parametrize("spec", GDN, ids=["shared-keys", "own-keys"])
def test_gated_delta_net_is_the_layer_of_qwen3_next(spec: GatedDeltaNet) -> None:
    """Their projections stand together by key head: q, k, its values, its gates; and b, a likewise."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    theirs = randomised(Qwen3NextGatedDeltaNet(transformers.Qwen3NextConfig(**linear_fields(spec)), 0))
    named = theirs.state_dict()
    share = spec.num_value_heads // spec.num_key_heads
    sizes = [spec.key_head_dim, spec.key_head_dim, share * spec.value_head_dim, share * spec.value_head_dim]
    by_head = named["in_proj_qkvz.weight"].unflatten(0, (spec.num_key_heads, -1)).split(sizes, dim=1)
    b, a = named["in_proj_ba.weight"].unflatten(0, (spec.num_key_heads, -1)).split(share, dim=1)
    weights = {
        "input.weight": torch.cat([part.flatten(0, 1) for part in (*by_head, b, a)]),
        "conv_weight": named["conv1d.weight"].squeeze(1),
        "a_log": named["A_log"],
        "dt_bias": named["dt_bias"],
        "norm_weight": named["norm.weight"],
        "output.weight": named["out_proj.weight"],
    }
    x = torch.randn(2, TIME, WIDTH)
    with torch.inference_mode():
        expected = theirs(x)
    assert_same_layer(spec, weights, x, expected)


@pytest.mark.parametrize("spec", GDN, ids=["shared-keys", "own-keys"])
def test_gated_delta_net_is_the_layer_of_olmo_hybrid(spec: GatedDeltaNet) -> None:
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = transformers.OlmoHybridConfig(**linear_fields(spec), linear_allow_neg_eigval=True)
    theirs = randomised(OlmoHybridGatedDeltaNet(config, 0))
    named = theirs.state_dict()
    weights = {
        "input.weight": torch.cat([named[f"{name}_proj.weight"] for name in "qkvgba"]),
        "conv_weight": named["conv1d.weight"].squeeze(1),
        "a_log": named["A_log"],
        "dt_bias": named["dt_bias"],
        "norm_weight": named["o_norm.weight"],
        "output.weight": named["o_proj.weight"],
    }
    x = torch.randn(2, TIME, WIDTH)
    with torch.inference_mode():
        expected = theirs(x)
    assert_same_layer(spec.model_copy(update={"allow_neg_eigval": True, "norm_eps": 1e-5}), weights, x, expected)


@pytest.mark.parametrize("channels", [WIDTH, 20])
def test_rwkv4_is_the_layers_of_rwkv(channels: int) -> None:
    from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention

    config = transformers.RwkvConfig(hidden_size=WIDTH, attention_hidden_size=channels, intermediate_size=50)
    x = torch.randn(2, TIME, WIDTH)
    time_mix, channel_mix = randomised(RwkvSelfAttention(config)), randomised(RwkvFeedForward(config))
    with torch.inference_mode():
        mixed, fed = time_mix(x)[0], channel_mix(x)[0]
    ours = {"decay": "time_decay", "bonus": "time_first"} | {
        f"{name}.weight": f"{name}.weight" for name in ("key", "value", "receptance", "output")
    }
    named = time_mix.state_dict()
    weights = {mine: named[other] for mine, other in ours.items()}
    weights["mix"] = torch.cat([named[f"time_mix_{name}"][0] for name in ("key", "value", "receptance")])
    assert_same_layer(RWKV4TimeMix(attention_hidden_size=channels), weights, x, mixed)
    named = channel_mix.state_dict()
    weights = {f"{name}.weight": named[f"{name}.weight"] for name in ("key", "value", "receptance")}
    weights["mix"] = torch.cat([named[f"time_mix_{name}"][0] for name in ("key", "receptance")])
    assert_same_layer(RWKV4ChannelMix(intermediate_size=50), weights, x, fed)


@pytest.mark.parametrize(("channels", "blocks"), [(WIDTH, 3), (30, 1)])
def test_rg_lru_is_the_layer_of_recurrent_gemma(channels: int, blocks: int) -> None:
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = transformers.RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=channels, num_attention_heads=blocks, num_hidden_layers=2, conv1d_width=3
    )
    theirs = randomised(RecurrentGemmaRecurrentBlock(config, 0))
    named = theirs.state_dict()
    weights = {
        f"{mine}.{kind}": torch.cat([named[f"{name}.{kind}"] for name in names])
        for mine, names in {"input": ("linear_x", "linear_y"), "output": ("linear_out",)}.items()
        for kind in ("weight", "bias")
    }
    weights |= {
        "conv_weight": named["conv_1d.weight"].squeeze(1),
        "conv_bias": named["conv_1d.bias"],
        "gates": torch.cat([named[f"rg_lru.{name}_gate_weight"] for name in ("input", "recurrent")], dim=-1),
        "gates_bias": torch.cat([named[f"rg_lru.{name}_gate_bias"] for name in ("input", "recurrent")], dim=-1),
        "decay": named["rg_lru.recurrent_param"],
    }
    x = torch.randn(2, TIME, WIDTH)
    with torch.inference_mode():
        expected = theirs(x, torch.arange(TIME)[None], None, use_cache=False)[0]
    assert_same_layer(
        RGLRU(lru_width=channels, num_attention_heads=blocks, conv1d_width=3),
        weights,
        x,
        expected,
    )
