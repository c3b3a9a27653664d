"""Models the profile tests share: Llama 3.1 8B, a mixture of experts, a state space model and a hybrid, and tiny ones."""

from pathlib import Path
from typing import Any

import pytest

from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles import tables


def attention(heads: int, key_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "attention",
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": dim,
        **more,
    }


def mlp(size: int) -> dict[str, Any]:
    return {"kind": "gated_mlp", "intermediate_size": size}


def moe(experts: int, chosen: int, size: int) -> dict[str, Any]:
    return {"kind": "moe", "num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": size}


def mamba2(heads: int, dim: int, size: int) -> dict[str, Any]:
    return {"kind": "mamba2", "num_heads": heads, "head_dim": dim, "state_size": size}


def model(name: str, width: int, vocab: int, layers: str, **blocks: Any) -> ModelSpec:
    fields = {"name": name, "hidden_size": width, "vocab_size": vocab, "layers": layers, "blocks": blocks}
    return ModelSpec.model_validate(fields)


LLAMA = model("llama-3.1-8b", 4096, 128256, "32*(attention mlp)", attention=attention(32, 8, 128), mlp=mlp(14336))
GIANT = model(  # as many experts of the same size as DeepSeek-V3, with plain attention: 671B parameters and more
    "giant-moe", 7168, 129280, "3*(attention mlp) | 58*(attention moe)",
    attention=attention(128, 8, 128), mlp=mlp(18432), moe=moe(256, 8, 2048),
)  # fmt: skip
TINY = {
    "transformer": model("t", 64, 256, "2*(attention mlp)", attention=attention(4, 2, 16), mlp=mlp(128)),
    "moe": model("m", 64, 256, "2*(attention moe)", attention=attention(4, 4, 16), moe=moe(8, 2, 32)),
    "ssm": model("s", 64, 256, "3*(mamba)", mamba=mamba2(4, 32, 16)),
    "hybrid": model(
        "h", 64, 256, "mamba mlp | mamba moe | attention mlp",
        mamba=mamba2(4, 32, 16), attention=attention(4, 2, 16, sliding_window=24), mlp=mlp(96), moe=moe(4, 1, 64),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_calibration_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Predictions of tests never depend on what lies in somebody's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tables.forget()
    return tmp_path / "cache" / "archcompass"


@pytest.fixture
def llama() -> ModelSpec:
    return LLAMA


@pytest.fixture
def giant() -> ModelSpec:
    return GIANT


@pytest.fixture(params=sorted(TINY))
def tiny(request: pytest.FixtureRequest) -> ModelSpec:
    return TINY[request.param]


@pytest.fixture
def families() -> dict[str, ModelSpec]:
    return TINY
