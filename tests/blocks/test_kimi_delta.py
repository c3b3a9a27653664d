"""Kimi Delta Attention against the layer of transformers, with its weights."""

import pytest
import torch
from torch import Tensor

from archcompass.blocks.kimi_delta.spec import KimiDelta
from archcompass.blocks.runtime import BlockModule

transformers = pytest.importorskip("transformers")

WIDTH = 20


def peer(spec: KimiDelta) -> torch.nn.Module:
    """Their layer with random weights."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = transformers.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=spec.num_attention_heads,
        linear_head_dim=spec.head_dim,
        linear_conv_kernel_dim=spec.conv_kernel,
        rms_norm_eps=spec.norm_eps,
    )
    torch.manual_seed(0)
    layer = KimiLinearDeltaAttention(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.eval()


def ours(spec: KimiDelta, theirs: dict[str, Tensor]) -> BlockModule:
    """Our block with their weights."""
    module = spec.build(WIDTH)
    inward = ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj")
    module.load_state_dict(
        {
            "input.weight": torch.cat([theirs[f"{name}.weight"] for name in inward]),
            "conv_weight": theirs["conv1d.weight"].squeeze(1),
            "decay.weight": theirs["forget_gate.f_b_proj.weight"],
            "a_log": theirs["forget_gate.A_log"].flatten(),
            "dt_bias": theirs["forget_gate.dt_bias"],
            "gate.weight": theirs["g_b_proj.weight"],
            "norm_weight": theirs["o_norm.weight"],
            "output.weight": theirs["o_proj.weight"],
        }
    )
    return module


@pytest.mark.parametrize("spec", KimiDelta.tiny(), ids=str)
def test_the_layer_of_transformers_says_the_same(spec: KimiDelta) -> None:
    theirs = peer(spec)
    module = ours(spec, theirs.state_dict())
    x = torch.randn(2, 75, WIDTH)
    with torch.inference_mode():
        expected = theirs(x)
        whole, _ = module(x)
        state, parts = None, []
        for start, end in [(0, 40), (40, 41), (41, 42), (42, 75)]:
            y, state = module(x[:, start:end], state)
            parts.append(y)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_decay_over_channels_is_gated_delta_net() -> None:
    """With F_b and b_dt alike in every channel of a head, the vector decay is Gated DeltaNet's scalar one."""
    from archcompass.blocks.time_mixing import rewrite, unit

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 6, dtype=torch.float64) for _ in range(3))
    beta = torch.rand(1, 30, 2, dtype=torch.float64)
    decay = -torch.rand(1, 30, 2, dtype=torch.float64)
    scalar, state = rewrite(unit(q), unit(k), v, beta, decay, None)
    vector, last = rewrite(unit(q), unit(k), v, beta, decay[..., None].expand(-1, -1, -1, 6).contiguous(), None)
    torch.testing.assert_close(vector, scalar)
    torch.testing.assert_close(last, state)
