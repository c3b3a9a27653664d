"""A workload: what the user wants, on what, in the user's own units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from archcompass.advisor import units
from archcompass.advisor.defaults import Default, defaults
from archcompass.errors import InputError, nearest
from archcompass.profiles.units import BYTE_UNITS

Task = Literal[
    "chat", "qa", "rag", "agent", "code", "complete", "reason", "summarize", "extract", "classify", "translate",
    "write", "embed", "forecast", "detect", "transcribe", "control", "generate",
]  # fmt: skip
Modality = Literal["text", "code", "logs", "time-series", "sensors", "audio", "genome", "images", "video"]
Breadth = Literal["narrow", "moderate", "broad", "encyclopedic"]
Knowledge = Literal["weights", "documents", "both"]
Recall = Literal["none", "low", "medium", "high", "exact"]
Reasoning = Literal["low", "medium", "high", "extreme"]
Accuracy = Literal["standard", "high", "uncompromising"]
PrecisionName = Literal[
    "auto", "bf16", "fp16", "fp8", "int8", "int4", "mxfp4", "nvfp4", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"
]
Mode = Literal["inference", "finetuning", "training"]

_SYNONYMS = {"huge": "encyclopedic", "encyclopaedic": "encyclopedic", "wide": "broad", "small": "narrow"}
_SYNONYMS |= {"summarise": "summarize", "summarization": "summarize", "translation": "translate", "logging": "logs"}
_SYNONYMS |= {"timeseries": "time-series", "coding": "code", "fine-tuning": "finetuning", "fine-tune": "finetuning"}
_SYNONYMS |= {"train": "training", "infer": "inference", "serving": "inference", "anomaly": "detect", "dna": "genome"}


def _choice(value: object) -> object:
    """Enumerated words in any case, with spaces or underscores for hyphens."""
    word = value.strip().lower() if isinstance(value, str) else value
    return word.replace("_", "-").replace(" ", "-") if isinstance(word, str) and word not in PRECISIONS else word


PRECISIONS = frozenset(get_args(PrecisionName))


def _or_none(read: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else read(value)


def _flag(value: object) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = words.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise InputError(f"is {value!r}; write true or false")
    return found


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 100:
        raise InputError(f"is {str(value)[:40]!r}; write a card's name, as in '2x RTX 4090' or 'cpu'")
    return " ".join(value.split())


def _parsed(read: Callable[[object], Any]) -> BeforeValidator:
    return BeforeValidator(read)


_CHOICE = _parsed(_choice)
_OUTPUT = _parsed(lambda value: units.tokens(value, high=2**24))
_MEMORY = _parsed(_or_none(units.memory))


class Workload(BaseModel):
    """What the user wants. Frozen; unknown keys are refused; every key has a default that can be listed.

    Attributes: each field's description says what it is; tokens are whole numbers, memory is in bytes once parsed.

    Raises:
        InputError: one line with the key, the value, the rule and the nearest right value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Annotated[Task, _CHOICE] = Field(description="what the model is asked to do")
    modality: Annotated[Modality, _CHOICE] = Field(description="what it reads")
    context: Annotated[int | Literal["unbounded"], _parsed(units.context)] = Field(
        description='tokens of one long sequence (95 of 100 are shorter), or "unbounded"'
    )
    output: Annotated[int, _OUTPUT] = Field(description="tokens it writes per request")
    corpus: Annotated[int | None, _parsed(_or_none(lambda v: units.tokens(v, high=2**50)))] = Field(
        description="tokens of the whole archive behind the requests"
    )
    stream: Annotated[bool, _parsed(_flag)] = Field(description="the input never ends")
    breadth: Annotated[Breadth, _CHOICE] = Field(description="how many unrelated subjects")
    knowledge: Annotated[Knowledge, _CHOICE] = Field(description="where the facts are: in the weights or in documents")
    recall: Annotated[Recall, _CHOICE] = Field(description="how exactly it must repeat what it has read")
    reasoning: Annotated[Reasoning, _CHOICE] = Field(description="how hard it must think")
    accuracy: Annotated[Accuracy, _CHOICE] = Field(description="what an error costs")
    concurrency: Annotated[int, _parsed(lambda v: units.whole(v, low=1, high=10**6, unit="sequences"))] = Field(
        description="sequences alive at once"
    )
    ttft_ms: Annotated[float | None, _parsed(_or_none(units.milliseconds))] = Field(
        description="milliseconds to the first token at most"
    )
    tokens_per_second: Annotated[
        float | None, _parsed(_or_none(lambda v: units.within(units.plain(v), low=1e-3, high=1e6)))
    ] = Field(description="tokens per second that each user is to see")
    prefix_reuse: Annotated[Literal["low", "high"], _CHOICE] = Field(description="how much of the prompt comes again")
    gpu: Annotated[str, _parsed(_name)] = Field(
        description='the card: "rtx-4090", "2x H100 SXM", "cpu", or by hand "24GB 1008GB/s 165TFLOPS"'
    )
    vram: Annotated[int | None, _MEMORY] = Field(description="memory of one card, instead of the card's own")
    ram: Annotated[int | None, _MEMORY] = Field(description="system memory that experts may be kept in")
    precision: Annotated[PrecisionName, _CHOICE] = Field(description="how weights are stored")
    mode: Annotated[Mode, _CHOICE] = Field(description="run it, adapt it or train it")
    ecosystem: Annotated[Literal["any", "mature"], _CHOICE] = Field(description="whether young tools are accepted")

    def __init__(self, **values: Any) -> None:
        given = {key: value for key, value in values.items() if value is not None}
        _refuse_unknown(given)
        try:
            super().__init__(**{key: d.value for key, d in defaults(_settled(given)).items()} | given)
        except ValidationError as error:
            raise _one_line(error) from error
        object.__setattr__(self, "__pydantic_fields_set__", set(given))

    @property
    def given(self) -> dict[str, Any]:
        """The keys the user gave, parsed."""
        return {key: getattr(self, key) for key in KEYS if key in self.model_fields_set}

    @property
    def defaulted(self) -> dict[str, Default]:
        """The keys the user did not give: the value taken for each and the reason."""
        assumed = defaults(self.given)
        return {key: assumed[key] for key in KEYS if key not in self.model_fields_set}

    @property
    def unbounded(self) -> bool:
        """Whether a sequence has no end."""
        return not isinstance(self.context, int)

    def replace(self, **changes: Any) -> Workload:
        """The same workload with some keys given anew. What was defaulted stays as it was, so nothing else moves."""
        everything = {key: getattr(self, key) for key in KEYS}
        changed = Workload(**everything | changes)
        object.__setattr__(changed, "__pydantic_fields_set__", self.model_fields_set | set(changes))
        return changed

    def varied(self, **parsed: Any) -> Workload:
        """As `replace`, for values that are known to be right: nothing is read or checked again."""
        return self.model_copy(update=parsed)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str = "") -> Self:
        """The workload that a file's mapping describes; a header `archcompass: 1` is allowed.

        Raises:
            InputError: an unknown key or an impossible value; `where` heads the message.
        """
        try:
            return cls(**{key: value for key, value in data.items() if key != "archcompass"})
        except InputError as error:
            raise InputError(f"{where}: {error}" if where else str(error)) from error

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The workload in a YAML file.

        Raises:
            FileFormatError: the file is not what it should be.
            InputError: an unknown key or an impossible value.
        """
        from archcompass.blocks.model.files import read_mapping

        path = Path(path)
        return cls.from_mapping(read_mapping(path), path.name)

    def to_yaml(self) -> str:
        """The file's text: what was given as keys, what was taken by default as comments with the reason."""
        lines = [yaml.safe_dump({key: _written(key, value)}, allow_unicode=True) for key, value in self.given.items()]
        notes = [f"# {key}: {_shown(key, d.value)}   # {d.reason}\n" for key, d in self.defaulted.items()]
        header = [] if lines else ["archcompass: 1\n"]  # a file of comments alone says nothing
        return "".join([*header, *lines, "\n# not given, so taken as:\n" if notes else "", *notes])


KEYS: tuple[str, ...] = tuple(Workload.model_fields)


def _settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given words as they will be read, for the defaults that lean on them."""
    settled = {key: _choice(value) for key, value in given.items() if isinstance(value, (str, int, float))}
    if "context" in given and isinstance(given["context"], str):
        settled["context"] = units.UNBOUNDED if given["context"].strip().lower() in units.ENDLESS else given["context"]
    if isinstance(given.get("stream"), str):
        settled["stream"] = given["stream"].strip().lower() in ("true", "yes", "on")
    return settled


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for key in given:
        if key not in KEYS:
            close = nearest(key.replace("-", "_"), KEYS, count=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(KEYS)}"
            raise InputError(f"{key!r} is not a key of a workload; {hint}")


def _one_line(error: ValidationError) -> InputError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "literal_error":
        return InputError(f"{key} is {str(first['input'])[:40]!r}; {_choices(key, first['input'])}")
    return InputError(f"{key} {first['msg'].removeprefix('Value error, ')}")


def choices(key: str) -> tuple[str, ...]:
    """The words that `key` may take; empty for numbers and names."""
    words = get_args(Workload.model_fields[key].annotation)
    return tuple(word for word in words if isinstance(word, str)) if key != "context" else ()


def _choices(key: str, value: object) -> str:
    words = choices(key)
    listed = f"choose {', '.join(words[:-1])} or {words[-1]}"
    synonyms = {said: meant for said, meant in _SYNONYMS.items() if meant in words}
    close = nearest(str(value), [*words, *synonyms], count=1)
    return f"{listed} (did you mean {synonyms.get(close[0], close[0])!r}?)" if close else listed


def _written(key: str, value: Any) -> Any:
    """A value as a person would write it and this class reads it back."""
    if key in ("vram", "ram") and isinstance(value, int):
        for unit in ("TB", "GB", "GiB", "MB", "MiB"):
            scale = BYTE_UNITS[unit.lower()]
            if value % scale == 0:
                return f"{value // scale}{unit}"
        return f"{value}B"
    if key in ("context", "output") and isinstance(value, int) and value % 1024 == 0:
        return units.say_tokens(value).replace(",", "")
    return value


def _shown(key: str, value: Any) -> str:
    return "none" if value is None else str(_written(key, value)).lower()
