"""A model is the sum of its blocks, as data and at work."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from archcompass.blocks.base import Step
from archcompass.blocks.model.module import LanguageModel
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.precision import FP32
from archcompass.errors import InputError
from archcompass.kernels.linear import linears

ATTENTION = {"kind": "attention", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WINDOW = ATTENTION | {"sliding_window": 6}
MLP = {"kind": "gated_mlp", "intermediate_size": 96}
MOE = {"kind": "moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"kind": "mamba2", "num_heads": 4, "head_dim": 16, "state_size": 16}
GUIDED = {
    "kind": "guided",
    "mixer": MAMBA,
    "attention": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
    "intermediate_size": 48,
    "adapter_rank": 4,
}
LATENT = {"kind": "mla", "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "indexer": {"n_heads": 16, "head_dim": 8, "topk": 6}}
RWKV_CHANNELS = {"kind": "rwkv4_channel_mix", "intermediate_size": 96}
SPARSE = ATTENTION | {"kind": "block_sparse_attention", "block_size": 4, "topk_blocks": 2}

SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {"blocks": {"a": ATTENTION, "m": MLP}, "layers": "2*(a m)"},
    "moe": {"blocks": {"a": ATTENTION, "e": MOE}, "layers": "2*(a e)", "tie_word_embeddings": True},
    "ssm": {"blocks": {"s": MAMBA}, "layers": "3*(s)", "residual": {"multiplier": 0.5}},
    "hybrid": {
        "blocks": {"a": ATTENTION, "w": WINDOW, "s": MAMBA, "e": MOE, "m": MLP},
        "layers": "s m | a e | s | w m",
        "residual": {"position": "sandwich"},
        "residuals": {"s": {"position": "post", "skip": "normed", "skip_multiplier": 2.0}},
        "embedding_multiplier": "sqrt_width",
        "embedding_norm": True,
        "logit_soft_cap": 5.0,
        "logit_multiplier": 0.5,
    },
    "parallel": {
        "blocks": {"p": {"kind": "parallel", "branches": {"attention": WINDOW, "mamba": MAMBA}}, "m": MLP},
        "layers": "2*(p m)",
    },
    "rwkv": {"blocks": {"t": {"kind": "rwkv4_time_mix"}, "c": RWKV_CHANNELS}, "layers": "2*(t c)"},
    "guided": {
        "blocks": {"s": MAMBA, "g": GUIDED},
        "layers": "s | g | s | g",
        "shared": ("g",),
        "residuals": {"g": {"position": "none"}},
    },
    "latent": {"blocks": {"a": LATENT, "e": MOE, "b": SPARSE}, "layers": "a e | b e"},
    "shared": {"blocks": {"a": ATTENTION, "m": MLP, "s": MAMBA}, "layers": "s | a m | s | a m", "shared": ("a", "m")},
}


def spec(name: str = "hybrid", **changes: Any) -> ModelSpec:
    return ModelSpec.model_validate({"hidden_size": 64, "vocab_size": 120} | SHAPES[name] | changes)


def build(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    return spec(name).build(dtype=dtype)


def ids(batch: int = 2, time: int = 19) -> torch.Tensor:
    return torch.randint(0, 120, (batch, time), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_state_are_those_of_the_model(name: str) -> None:
    model = build(name, torch.float32)
    assert spec(name).parameters().total == sum(parameter.numel() for parameter in model.parameters())
    step = Step(new_tokens=19, activations="fp32", cache_precision=FP32)
    with torch.inference_mode():
        state = model(ids()).state
    assert state is not None
    assert state.nbytes == 2 * spec(name).state_bytes(step)


@pytest.mark.parametrize("name", SHAPES)
def test_whole_prompt_segments_and_steps_agree(name: str) -> None:
    model = build(name)
    with torch.inference_mode():
        whole = model(ids()).logits
        for cuts in ([0, 7, 8, 19], list(range(20))):
            state, parts = None, []
            for start, end in pairwise(cuts):
                logits, state, _ = model(ids()[:, start:end], state)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_left_padding_gives_the_rows_alone(name: str) -> None:
    model, tokens = build(name), ids()
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[1, :6] = 0
    short = tokens[1:, 6:]
    with torch.inference_mode():
        padded = model(tokens, attention_mask=mask, logits_to_keep=3)
        torch.testing.assert_close(padded.logits[:1], model(tokens[:1]).logits[:, -3:], rtol=1e-9, atol=1e-9)
        alone = model(short)
        torch.testing.assert_close(padded.logits[1:], alone.logits[:, -3:], rtol=1e-9, atol=1e-9)
        next_token = torch.tensor([[5], [7]])
        step, step_alone = model(next_token, padded.state), model(next_token[1:], alone.state)
    torch.testing.assert_close(step.logits[1:], step_alone.logits, rtol=1e-9, atol=1e-9)


def test_logits_to_keep_computes_no_others() -> None:
    model, seen = build("transformer"), []
    model.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    logits = model.head.logits
    model.head.logits = lambda x, table: seen.append(x.shape) or logits(x, table)  # type: ignore[method-assign]
    with torch.inference_mode():
        last = model(ids(), logits_to_keep=1).logits
    assert seen == [(2, 1, 64)]
    torch.testing.assert_close(last, model(ids()).logits[:, -1:])


def test_a_copied_state_is_a_branch() -> None:
    model = build("hybrid")
    with torch.inference_mode():
        state = model(ids()).state
        branch = state.copy()
        first = model(ids(2, 1), state).logits
        model(ids(2, 4), state)
        assert torch.equal(first, model(ids(2, 1), branch).logits)


def test_generate_is_the_argmax_of_one_forward_and_leaves_training_alone() -> None:
    model = build("hybrid").train()
    new = model.generate(ids(), 8)
    assert new.shape == (2, 8)
    assert model.training
    with torch.inference_mode():
        logits = model.eval()(torch.cat([ids(), new], dim=1)).logits
    assert torch.equal(logits[:, 18:-1].argmax(-1), new)
    assert model.generate(ids(), 0).shape == (2, 0)


@pytest.mark.parametrize("name", ["moe", "hybrid", "shared"])
def test_loss_is_cross_entropy_plus_the_balance_of_experts(name: str) -> None:
    model = build(name).train()
    tokens = ids()
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    out = model(tokens, labels=labels)
    assert out.logits is None
    assert out.state is None
    logits = model(tokens).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    extra = out.loss.item() - plain.item()
    routers = sum(layer.count("e") for layer in spec(name).expanded)
    # An even router gives 1 for each layer of experts, and a fresh one is nearly even; the coefficient is 0.001.
    assert extra == pytest.approx(0.001 * routers, rel=0.3, abs=1e-12)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_indexer_adds_its_loss() -> None:
    model = build("latent").train()
    model(ids(), labels=ids().roll(-1, 1)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_padding_at_the_right_is_refused() -> None:
    model = build("transformer")
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(InputError, match="left"):
        model(ids(2, 3), attention_mask=mask)
    state = model(ids(2, 3)).state
    with pytest.raises(InputError, match="start only"):
        model(ids(2, 3), state, attention_mask=mask)


def test_a_shared_guide_leaves_each_place_its_own_mixer() -> None:
    model = build("guided")
    first, second = model.layers[1].block, model.layers[3].block
    assert first.guide is second.guide
    assert first.mixer is not second.mixer
    assert first.into.weight is not second.into.weight


def test_shared_blocks_are_one_module_with_two_states() -> None:
    model = build("shared")
    assert model.layers[1].block is model.layers[4].block
    state = model(ids()).state
    assert state.blocks[1] is not state.blocks[4]


def test_meta_builds_hundreds_of_billions_without_memory() -> None:
    big = spec(
        "moe",
        hidden_size=7168,
        layers="61*(a e)",
        blocks={
            "a": {"kind": "attention", "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
            "e": {"kind": "moe", "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        },
    )
    model = big.build(device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == big.parameters().total > 600e9
    assert sum(1 for _ in model.modules()) < 1000


@pytest.mark.parametrize("name", SHAPES)
def test_totals_are_consistent(name: str) -> None:
    model = spec(name)
    parameters = model.parameters()
    assert parameters.total >= parameters.active_with_table >= parameters.active > parameters.active_without_embeddings
    assert model.num_hidden_layers == len(model.expanded)
    assert sum(model.counts.values()) == len(build(name).layers)
    decode = model.work(Step(new_tokens=1, past_tokens=4096))
    weights = sum(op.weight_bytes * op.count for op in decode)
    if not model.shared:  # what is shared is read at every place it stands
        assert weights == pytest.approx(2 * parameters.active, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": "2*(a q)"}, ["layers", "'q'", "blocks has"]),
        ({"layers": "2*(attn e)"}, ["'attn'"]),
        ({"layers": "2*(e)"}, ["blocks.a", "never used"]),
        ({"blocks": {"a": ATTENTION, "e": MOE, "x": {"kind": "rms_norm"}}, "layers": "a e x"}, ["blocks.x", "norm"]),
        ({"norm": MLP}, ["norm", "gated_mlp"]),
        ({"residual": {"norm": MLP}}, ["residual.norm", "gated_mlp"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"vocab_size": -1}, ["vocab_size"]),
        ({"hidden_siz": 64}, ["hidden_siz"]),
        ({"blocks": {"a": {"kind": "atention"}, "e": MOE}}, ["atention", "nearest", "attention"]),
        ({"blocks": {"a": {"num_heads": 3}, "e": MOE}}, ["kind"]),
        (
            {"blocks": {"a": ATTENTION | {"num_key_value_heads": 3}, "e": MOE}},
            ["num_key_value_heads (3)", "nearest: 2"],
        ),
        ({"blocks": {"a": ATTENTION | {"head_dmi": 3}, "e": MOE}}, ["head_dmi", "head_dim"]),
        ({"blocks": {"a": ATTENTION, "e": MOE | {"num_experts_per_tok": 9}}}, ["num_experts_per_tok (9)", "(8)"]),
        ({"blocks": {"a": ATTENTION, "e": MOE | {"n_group": 3, "topk_group": 1}}}, ["n_group (3)", "nearest: 2"]),
        ({"shared": ("z",)}, ["'z'"]),
    ],
)
def test_impossible_models_are_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        spec("moe", **changes)
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_a_layout_for_decoding_changes_nothing_but_strides(
    name: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archcompass.blocks.layout.SMALLEST_SIDE", 16)
    model, laid = build(name, dtype), build(name, dtype).for_decoding()
    assert (laid.embedding.weight.stride() == (1, 120)) == (laid.head.weight is None)
    for layer in laid.layers:
        for group in layer.block.read_together():
            with torch.inference_mode():
                assert linears(torch.zeros(len(group), 1, 64, dtype=dtype), [one.weight for one in group]) is not None
    for (key, mine), (same, theirs) in zip(model.state_dict().items(), laid.state_dict().items(), strict=True):
        assert key == same
        assert torch.equal(mine, theirs)
    with torch.inference_mode():
        states = [one(ids(1), logits_to_keep=1).state for one in (model, laid)]
        before, after = (one(ids(1, 1), state).logits.float() for one, state in zip((model, laid), states, strict=True))
    assert (before - after).norm() <= bound * before.norm()
