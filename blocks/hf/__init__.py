"""Hugging Face configurations, both ways. Pure dictionaries: transformers is never imported, `auto_map` code never run.

One file per family in `families/` says how a config.json of that `model_type` reads, how a model is written as one, and
how the checkpoint's tensors are called. A configuration that this package cannot say, and a model that a family cannot
say, raise `ConversionError` with the field's name. Nothing is dropped in silence: a key is read, or known to have no
effect (`fields.NO_EFFECT`), or refused; and what was written is read back and compared.
"""

from archcompass.blocks.hf.configuration import load_config, load_hub, read_config, to_config

__all__ = ["load_config", "load_hub", "read_config", "to_config"]
