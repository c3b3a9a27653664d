"""Llama 4 with its vision tower: the text part of it. The tower's tensors are not read, and nothing is written as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from archcompass.blocks.hf.families import llama4_text
from archcompass.blocks.hf.family import Family
from archcompass.blocks.hf.fields import Fields
from archcompass.blocks.hf.weights import Weight
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import ConversionError

_TOWER = (
    "vision_config",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "tie_word_embeddings",
)


def read(fields: Fields) -> ModelSpec:
    """The language model of a Llama 4 configuration."""
    text = Fields({**fields.mapping("text_config"), "model_type": "llama4_text"}, llama4_text.FAMILY.no_effect)
    spec = llama4_text.read(text)
    text.finish()
    return spec


def write(spec: ModelSpec) -> NoReturn:
    """There is no tower to write.

    Raises:
        ConversionError: always; the text part is a llama4_text.
    """
    raise ConversionError("model_type 'llama4' includes a vision tower; write 'llama4_text'")


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """The text part's tensors under `language_model`."""
    for weight in llama4_text.weights(spec):
        yield Weight(weight.ours, tuple(f"language_model.{name}" for name in weight.theirs), weight.form)


FAMILY = Family(
    model_type="llama4",
    architecture="Llama4ForConditionalGeneration",
    read=read,
    write=write,
    weights=weights,
    no_effect=_TOWER,
    unused=(r".*rotary_emb\.inv_freq$", r"vision_model\.", r"multi_modal_projector\."),
)
