"""Mixtures of experts: routers, balance and the reference implementation of each family's layer."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from archcompass.blocks.base import TINY_WIDTH, Step
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.runtime import Context, initialise

BASE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(dtype: torch.dtype = torch.float64, **said: Any) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        module = MoE.model_validate(BASE | said).build(TINY_WIDTH)
    finally:
        torch.set_default_dtype(torch.float32)
    initialise(module)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


def tokens(time: int = 24, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, time, TINY_WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_the_selection_bias_chooses_but_does_not_weigh() -> None:
    said = {"scoring_func": "sigmoid", "selection_bias": True, "norm_topk_prob": False}
    module, x = build(**said), tokens()
    with torch.inference_mode():
        _, chosen = module._route(x.flatten(0, 1), x, None)
        module.selection_bias[3] = 100.0
        weights, experts = module._route(x.flatten(0, 1), x, None)
        scores = torch.sigmoid(module.router(x.flatten(0, 1)))
    assert (experts == 3).any(-1).all()
    assert not (chosen == 3).any(-1).all()
    torch.testing.assert_close(weights, scores.gather(-1, experts))
    assert module.selection_bias.dtype == torch.float32
    assert "selection_bias" in module.state_dict()
    assert "selection_bias" not in dict(module.named_parameters())


def test_rebalancing_moves_tokens_towards_idle_experts() -> None:
    module, x = build(scoring_func="sigmoid", selection_bias=True).train(), tokens(200)
    spreads = []
    for _ in range(60):
        module(x, None, Context(keep_state=False))
        spreads.append((module.load.max() - module.load.min()).item())
        module.rebalance(rate=0.01)
        assert not module.load.any()
    assert spreads[-1] < 0.5 * spreads[0]


def test_the_balance_loss_is_least_when_experts_share_evenly() -> None:
    module, x = build(router_aux_loss_coef=0.5).train(), tokens(64)
    module.router.weight.data.zero_()
    even, uneven = Context(keep_state=False), Context(keep_state=False)
    module(x, None, even)
    assert even.losses["load_balance"][0].item() == pytest.approx(0.5)
    module.router.weight.data[0] = x.flatten(0, 1).mean(0) * 50
    module(x.abs(), None, uneven)
    assert uneven.losses["load_balance"][0] > 0.55
    module.eval()(x, None, even)
    assert len(even.losses["load_balance"]) == 1


def test_padding_does_not_count_for_balance() -> None:
    module, x = build().train(), tokens()
    alone, padded = Context(keep_state=False), Context(keep_state=False, padding=torch.tensor([9, 9]))
    module(x[:, 9:], None, alone)
    module(x, None, padded)
    torch.testing.assert_close(alone.losses["load_balance"][0], padded.losses["load_balance"][0])


def test_experts_that_choose_take_equal_shares() -> None:
    module, x = build(routing="expert_choice", norm_topk_prob=False).train(), tokens()
    rows = x.flatten(0, 1)
    y = module(x, None, Context(keep_state=False))[0].flatten(0, 1)
    scores = module.router(rows).softmax(-1)
    expected = torch.zeros_like(rows)
    for e in range(8):
        best = scores[:, e].topk(12).indices  # 48 tokens, 2 of 8 experts each
        gate, up = (rows[best] @ module.gate_up[e].T).chunk(2, -1)
        expected[best] += scores[best, e, None] * (torch.nn.functional.silu(gate) * up @ module.down[e].T)
    torch.testing.assert_close(y, expected)
    assert not module.spec.traits.causal_in_training
    changed = x.clone()
    changed[:, 20:] *= 3
    assert not torch.allclose(module(changed, None, Context())[0][:, :20], y.view_as(x)[:, :20])
    module.eval()
    torch.testing.assert_close(module(changed)[0][:, :20], module(x)[0][:, :20])


def test_a_step_reads_the_experts_its_tokens_are_expected_to_touch() -> None:
    spec = MoE(num_experts=64, num_experts_per_tok=4, moe_intermediate_size=32)
    whole = 64 * 3 * 32 * TINY_WIDTH * 2

    def read(batch: int) -> float:
        operations = spec.work(TINY_WIDTH, Step(batch=batch, new_tokens=1, past_tokens=10))
        return sum(op.weight_bytes for op in operations if op.kind == "grouped_gemm")

    assert read(1) == pytest.approx(whole * 4 / 64)
    assert read(16) == pytest.approx(whole * (1 - (60 / 64) ** 16))
    assert read(4096) == pytest.approx(whole)


REFERENCES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mixtral", {"num_local_experts": 8}, {}),
    (
        "deepseek_v3",
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5},
        {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "selection_bias": True}
        | {"routed_scaling_factor": 2.5, "router_in_fp32": True, "shared_expert_intermediate_size": 16},
    ),
    (
        "qwen3_next",
        {"num_experts": 8, "shared_expert_intermediate_size": 24, "norm_topk_prob": True},
        {"shared_expert_intermediate_size": 24, "shared_expert_gate": True},
    ),
]


@pytest.mark.parametrize(("family", "config", "said"), REFERENCES, ids=[family for family, *_ in REFERENCES])
def test_layers_are_those_of_the_reference(family: str, config: dict[str, Any], said: dict[str, Any]) -> None:
    """Same weights, same outputs as the transformers layer."""
    pytest.importorskip("transformers")
    import importlib

    from transformers import AutoConfig

    sizes = {"hidden_size": TINY_WIDTH, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "intermediate_size": 16}
    made = AutoConfig.for_model(family, **(sizes | config))
    made._experts_implementation = "eager"
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    names = {
        "mixtral": "MixtralSparseMoeBlock",
        "deepseek_v3": "DeepseekV3MoE",
        "qwen3_next": "Qwen3NextSparseMoeBlock",
    }
    theirs = getattr(modeling, names[family])(made).eval()
    ours = build(torch.float32, **said)
    state = {name: value.detach().clone() for name, value in ours.state_dict().items()}
    renamed = {
        "router.weight": "gate.weight",
        "selection_bias": "gate.e_score_correction_bias",
        "gate_up": "experts.gate_up_proj",
        "down": "experts.down_proj",
        "shared_gate.weight": "shared_expert_gate.weight",
    }
    shared = "shared_experts" if family == "deepseek_v3" else "shared_expert"
    carried = {renamed[name]: value for name, value in state.items() if name in renamed}
    if "shared.inward.weight" in state:
        carried[f"{shared}.gate_proj.weight"], carried[f"{shared}.up_proj.weight"] = state[
            "shared.inward.weight"
        ].chunk(2)
        carried[f"{shared}.down_proj.weight"] = state["shared.down.weight"]
    theirs.load_state_dict(carried)
    x = tokens(dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        ({"n_group": 4}, "give both or neither"),
        ({"n_group": 4, "topk_group": 5}, "at most n_group"),
        ({"n_group": 8, "topk_group": 1}, "fewer than"),
        ({"gated": False, "swiglu_limit": 7.0}, "need gated"),
        ({"shared_expert_gate": True}, "needs a shared expert"),
        ({"routing": "expert_choice", "selection_bias": True}, "expert_choice needs no selection_bias"),
        ({"routing": "expert_choice", "scoring_func": "topk_softmax"}, "scores all experts"),
        ({"num_experts": 0}, "num_experts"),
    ],
)
def test_what_cannot_be_is_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MoE.model_validate(BASE | said)
