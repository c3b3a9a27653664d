"""A config.json being read: every key is taken, known to have no effect on the model, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from archcompass.blocks.model.pattern import MAX_LAYERS
from archcompass.errors import ConversionError, nearest

NO_EFFECT = frozenset(
    {
        # Which code and which file, not which model.
        "architectures",
        "auto_map",
        "model_type",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "quantization_config",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "attn_implementation",
        "base_model_tp_plan",
        # Text in and out.
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "prefix",
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        # What a call returns or how it is computed.
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "chunk_size_feed_forward",
        "use_bfloat16",
        "torchscript",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "pretraining_tp",
        "use_mamba_kernels",
        "use_cudagraph",
        # How text is drawn from the logits; old files keep it here.
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "min_length",
        "max_length",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "early_stopping",
        "length_penalty",
        "repetition_penalty",
        "diversity_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "remove_invalid_values",
        "output_scores",
        "return_dict_in_generate",
        "pruned_heads",
        "tf_legacy_loss",
        # Only the start of a training run, or training itself.
        "initializer_range",
        "initializer_factor",
        "attention_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "hidden_dropout",
        "dropout",
        "dropout_rate",
        "activation_dropout",
        "classifier_dropout",
        "layerdrop",
        "rescale_prenorm_residual",
        "router_jitter_noise",
        "router_aux_loss_coef",
        "aux_loss_alpha",
        "seq_aux",
        "aux_loss_coef",
        "router_z_loss_coef",
    }
)
"""Keys that change neither what the model computes nor how large it is."""

_MISSING: Any = object()


class Fields:
    """The keys of one configuration.

    Args:
        config: the parsed file.
        no_effect: further keys that have no effect in this family.
        aliases: other spellings of a key, and the one that the family's adapter asks for.

    Raises:
        ConversionError: two spellings of one key say different things.
    """

    def __init__(
        self, config: Mapping[str, Any], no_effect: Sequence[str] = (), aliases: Mapping[str, str] | None = None
    ) -> None:
        self.config = dict(config)
        self.model_type = str(config.get("model_type"))
        for other, key in (aliases or {}).items():
            value = self.config.pop(other, None)
            if value is not None and self.config.setdefault(key, value) != value:
                self.refuse(other, value, f"the same as {key}, which is {self.config[key]!r}")
        self._left = {key for key in self.config if key not in NO_EFFECT} - set(no_effect)

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value."""
        return self.config.get(key) is not None

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key`; where it is absent or null, `default`.

        Raises:
            ConversionError: the key is needed and absent.
        """
        self._left.discard(key)
        value = self.config.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConversionError(f"{key} is missing from this {self.model_type} configuration")
        return default

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """A whole number, or the default."""
        value = self.take(key, default)
        if key in self and (isinstance(value, bool) or not isinstance(value, int)):
            self.refuse(key, value, "a whole number")
        if key == "num_hidden_layers" and isinstance(value, int) and value > MAX_LAYERS:
            self.refuse(key, value, f"at most {MAX_LAYERS}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A number, or the default."""
        value = self.take(key, default)
        if key in self and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(key, value, "a number")
        return float(value) if key in self else value

    def flag(self, key: str, default: Any = _MISSING) -> Any:
        """True or false, or the default."""
        value = self.take(key, default)
        if key in self and not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value

    def sequence(self, key: str, default: Any = _MISSING) -> Any:
        """A list, or the default."""
        value = self.take(key, default)
        if key in self and not isinstance(value, list | tuple):
            self.refuse(key, value, "a list")
        return value

    def mapping(self, key: str, default: Any = _MISSING) -> Any:
        """A mapping, or the default."""
        value = self.take(key, default)
        if key in self and not isinstance(value, Mapping):
            self.refuse(key, value, "a mapping")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Takes a key that this package can only say in one way; absent and null pass.

        Raises:
            ConversionError: it says something else.
        """
        value = self.take(key, None)
        if value is not None and value not in allowed:
            self.refuse(key, value, " or ".join(repr(choice) for choice in allowed))

    def refuse(self, key: str, value: Any, rule: str) -> NoReturn:
        """Raises `ConversionError` about one key."""
        raise ConversionError(
            f"{key} is {str(value)[:80]!r} in this {self.model_type} configuration; it must be {rule}"
        )

    def finish(self) -> None:
        """Refuses the first key that nobody took, unless its value is null.

        Raises:
            ConversionError: names it.
        """
        for key in sorted(self._left):
            if self.config[key] is not None:
                close = nearest(key, set(self.config) | {"hidden_size"} - {key}, count=1)
                hint = f" (near {close[0]!r})" if close and close[0] != key else ""
                raise ConversionError(
                    f"{key} is {str(self.config[key])[:60]!r}; this {self.model_type} adapter does not know "
                    f"the field{hint} and will not drop it"
                )
