"""A config.json being read: every key is taken, known to have no effect on the model, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

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

_NEVER_ZERO = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_mamba_heads",
        "mamba_n_heads",
        "num_heads",
        "head_dim",
        "linear_num_key_heads",
        "num_mem_blocks",
        "attn_layer_period",
        "expert_layer_period",
        "interleave_moe_layer_step",
        "no_rope_layer_interval",
        "full_attention_interval",
        "sliding_window_pattern",
        "sliding_window",
    }
)
"""Whole numbers that others are divided by, or that bound what a query sees."""

_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
"""Kinds of layers as older files call them."""

Choice = TypeVar("Choice")


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
        self._spelled: dict[str, str] = {}
        for other, key in (aliases or {}).items():
            self._respell(other, key)
        self.asked = "model_type"
        self._left = {key for key in self.config if key not in NO_EFFECT} - set(no_effect)

    def _respell(self, other: str, key: str) -> None:
        value = self.config.pop(other, None)
        if value is None:
            return
        if key not in self:
            self.config[key], self._spelled[key] = value, other
        elif self.config[key] != value:
            self.refuse(other, value, f"the same as {key}, which is {self.config[key]!r}")

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value."""
        return self.config.get(key) is not None

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key`; where it is absent or null, `default`.

        Raises:
            ConversionError: the key is needed and absent.
        """
        self._left.discard(key)
        self.asked = key
        value = self.config.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConversionError(f"{key} is missing from this {self.model_type} configuration")
        return default

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """A whole number that is not negative, or the default."""
        value = self.take(key, default)
        if key not in self:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, value, "a whole number")
        if value < (least := int(key in _NEVER_ZERO)):
            self.refuse(key, value, f"at least {least}")
        if key == "num_hidden_layers" and value > MAX_LAYERS:
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

    def automatic(self, key: str, automatic: int) -> int:
        """A whole number, or `automatic` where the file is silent or says "auto"."""
        return automatic if self.take(key, "auto") == "auto" else int(self.integer(key))

    def sequence(self, key: str, default: Any = _MISSING, entries: int | None = None) -> Any:
        """A list, of so many entries where a number is given, or the default."""
        value = self.take(key, default)
        if key in self and not isinstance(value, list | tuple):
            self.refuse(key, value, "a list")
        if entries is not None and len(value) != entries:
            self.refuse(key, value, f"a list of {entries}")
        return value

    def choice(self, key: str, choices: Mapping[str, Choice], default: str) -> Choice:
        """What the word under `key`, or the default, stands for."""
        word = self.take(key, default)
        if not isinstance(word, str) or word not in choices:
            self.refuse(key, word, " or ".join(choices))
        return choices[word]

    def kinds(self, key: str, default: Sequence[str], *known: str) -> list[str]:
        """What each layer is, or the default, which is as long as the model is deep; older names become today's."""
        said = [_OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in self.sequence(key, default)]
        if len(said) != len(default):
            self.refuse(key, f"a list of {len(said)}", f"one of {len(default)}, an entry for each layer")
        for kind in said:
            if kind not in known:
                self.refuse(key, kind, " or ".join(known))
        return said

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
        """Raises `ConversionError` about one key, in the file's own spelling."""
        raise ConversionError(
            f"{self._spelled.get(key, key)} is {str(value)[:80]!r} in this {self.model_type} configuration; it must be {rule}"
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
