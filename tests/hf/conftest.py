"""Tiny random models of transformers, the oracle: made once per session, saved, and read by our adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from archcompass.blocks.hf.checkpoint import load_pretrained
from archcompass.blocks.model.module import LanguageModel

VOCABULARY = 97


@dataclass
class Pair:
    """One model on both sides, with the same weights.

    Attributes:
        theirs: the transformers model.
        ours: the same weights through our adapter.
        folder: where transformers saved it.
        ids: [2, 45] tokens.
    """

    theirs: Any
    ours: LanguageModel
    folder: Path
    ids: torch.Tensor

    def their_logits(self, ids: torch.Tensor, model: Any = None) -> torch.Tensor:
        """Logits of transformers for whole sequences."""
        with torch.no_grad():
            logits: torch.Tensor = (model or self.theirs)(ids, use_cache=False).logits
        return logits

    def our_logits(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Our logits for whole sequences."""
        with torch.inference_mode():
            logits = self.ours(ids, **options).logits
        assert logits is not None
        return logits


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_single_threaded(one_thread: None, quiet_transformers: None) -> None:
    """For every test of this folder."""


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Pair]:
    """Makes a pair from the name of a configuration class and its arguments."""
    made: dict[str, Pair] = {}

    def make(cls: str, arguments: dict[str, Any]) -> Pair:
        key = f"{cls}{sorted(arguments.items(), key=str)}"
        if key not in made:
            made[key] = _pair(cls, arguments, tmp_path_factory.mktemp("peer"))
        return made[key]

    return make


def _pair(cls: str, arguments: dict[str, Any], folder: Path) -> Pair:
    import transformers

    torch.manual_seed(len(str(arguments)))
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, cls)(**{**tokens, **arguments})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    ids = torch.randint(0, VOCABULARY, (2, 45))
    return Pair(theirs, load_pretrained(folder), folder, ids)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Every weight, norm, bias and router bias away from its start, decays where they are felt within a few tokens."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]
    for name, parameter in [*model.named_parameters(), *buffers]:
        if name.endswith("A_log"):
            parameter.uniform_(0, 1)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4, -1)
        elif name.endswith(("time_decay", "time_first")):
            parameter.uniform_(-1, 1)
        elif parameter.dim() > 1:
            parameter.normal_(0, 0.15)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
