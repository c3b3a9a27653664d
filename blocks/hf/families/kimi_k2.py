"""Kimi K2 (Moonshot, 2025) under its own name: DeepSeek-V3 with other numbers, and written as that."""

from __future__ import annotations

from dataclasses import replace

from archcompass.blocks.hf.families import deepseek_v3
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.model.spec import ModelSpec


def read(fields: Fields) -> ModelSpec:
    """The model of a Kimi K2 configuration."""
    return deepseek_v3.read(fields).model_copy(update={"model_type": "deepseek_v3"})


FAMILY = replace(deepseek_v3.FAMILY, model_type="kimi_k2", read=read)
