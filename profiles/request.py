"""What is asked of a model on a machine: how many sequences, how long, in which precision, to infer or to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from archcompass.blocks.base import Step
from archcompass.blocks.precision import PRECISIONS, Precision, precision
from archcompass.errors import InputError, UnknownNameError

Mode = Literal["inference", "finetuning", "training"]
Engine = Literal["native", "transformers", "vllm", "llama.cpp"]
Optimizer = Literal["adamw", "adamw-8bit", "sgd"]
Recompute = Literal["none", "selective", "full"]
Parallel = Literal["tensor", "data", "pipeline"]

MODES: tuple[Mode, ...] = ("inference", "finetuning", "training")
ENGINES: tuple[Engine, ...] = ("native", "transformers", "vllm", "llama.cpp")
CACHE_PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "q8_0", "q4_0")
MAX_TOKENS = 2**40

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "engine": ENGINES,
    "optimizer": ("adamw", "adamw-8bit", "sgd"),
    "recompute": ("none", "selective", "full"),
    "parallel": ("tensor", "data", "pipeline"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the ledger and the predictor.

    Attributes:
        batch: sequences computed together.
        prompt: tokens of each prompt; in training, of each sequence.
        generate: tokens generated after it; speeds are averages over them, memory is that of the last.
        mode: finetuning counts as training of all weights.
        precision: storage of weight matrices.
        kv_precision: storage of caches that grow with context; None follows the activations.
        engine: which software runs the model.
        prefill_tokens: most tokens in one forward call of the prefill, over all sequences; longer prompts go in chunks.
        optimizer, master_weights: training states; fp32 moments, or 8-bit; an fp32 copy of the weights.
        recompute: activations that the backward pass computes again rather than keeps.
        parallel: how several cards share one model. "tensor": every card computes a part of every product and holds a part
            of every head's cache. "data": every card has the whole of its own sequences and a copy of all but the routed
            experts, which are shared out (attention in data parallel, experts in expert parallel); when training, every
            card has its own sequences and a part of the weights (fully sharded). "pipeline": every card has some layers.
        offload: share of the routed experts' weights that lies in system memory and not on the cards.
        ram_bytes_per_second: bandwidth of that memory.
    """

    batch: int = 1
    prompt: int = 1024
    generate: int = 256
    mode: Mode = "inference"
    precision: str = "bf16"
    kv_precision: str | None = None
    engine: Engine = "native"
    prefill_tokens: int = 8192
    optimizer: Optimizer = "adamw"
    master_weights: bool = False
    recompute: Recompute = "none"
    parallel: Parallel = "tensor"
    offload: float = 0.0
    ram_bytes_per_second: float = 80e9

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "prefill_tokens"):
            _whole(name, getattr(self, name), 1)
        _whole("generate", self.generate, 0)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        if not 0.0 <= self.offload <= 1.0:
            raise InputError(
                f"offload is {self.offload}: it must lie between 0 and 1; nearest: {round(self.offload > 1)}"
            )
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", str(self.precision), PRECISIONS)
        if self.kv_precision is not None and self.kv_precision not in CACHE_PRECISIONS:
            raise UnknownNameError("kv_precision", str(self.kv_precision), CACHE_PRECISIONS)
        if self.training and PRECISIONS[self.precision].bits < 16:
            raise InputError(
                f"precision is {self.precision!r}: weights are trained in fp32, bf16 or fp16; nearest: bf16"
            )

    @property
    def training(self) -> bool:
        """Whether a backward pass follows."""
        return self.mode != "inference"

    @property
    def gguf(self) -> bool:
        """Whether the weights lie in a GGUF file, which quantises embedding and head too."""
        return self.precision.startswith("q")

    @property
    def context(self) -> int:
        """Tokens per sequence that the state holds at the end."""
        return self.prompt + self.generate

    @property
    def activations(self) -> Literal["fp32", "bf16", "fp16"]:
        """Dtype of activations: fp32 and fp16 weights bring their own, all others compute in bf16."""
        if self.precision == "fp32":
            return "fp32"
        return "fp16" if self.precision == "fp16" else "bf16"

    @property
    def weight_precision(self) -> Precision:
        """Storage format of the weights."""
        return precision(self.precision)

    @property
    def cache_precision(self) -> Precision:
        """Storage format of what grows with the context."""
        return precision(self.kv_precision or self.activations)

    @property
    def chunk(self) -> int:
        """New tokens per sequence in one forward call of the prefill."""
        return min(self.prompt, max(64, self.prefill_tokens // self.batch))

    def on_each(self, cards: int) -> Request:
        """What one card of several is asked for, where each has its own sequences."""
        return replace(self, batch=-(-self.batch // cards)) if self.parallel == "data" and cards > 1 else self

    def step(self, new_tokens: int, past_tokens: int = 0, logits_to_keep: int = 1) -> Step:
        """A forward call in these precisions."""
        return Step(
            batch=self.batch,
            new_tokens=new_tokens,
            past_tokens=past_tokens,
            training=self.training,
            precision=self.weight_precision,
            cache_precision=self.cache_precision,
            activations=self.activations,
            logits_to_keep=logits_to_keep,
        )

    def prefill_steps(self) -> list[tuple[int, Step]]:
        """(how often, forward call) of the whole prompt: equal chunks, told by the one in their middle, then the rest."""
        whole, rest = divmod(self.prompt, self.chunk)
        middle = (whole - 1) * self.chunk // 2
        steps = [(whole, self.step(self.chunk, middle))]
        return [*steps, (1, self.step(rest, whole * self.chunk))] if rest else steps

    def decode_step(self) -> Step:
        """One generated token at the average context of them all."""
        return self.step(1, self.prompt + max(self.generate - 1, 0) // 2)


def usual_parallel(mode: str, engine: str) -> Parallel:
    """How several cards share a model where nobody says: training has sequences of its own on each, llama.cpp gives each
    some layers, all else splits every product."""
    if mode != "inference":
        return "data"
    return "pipeline" if engine == "llama.cpp" else "tensor"


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {value!r}: it must be a whole number; nearest: {least}")
    if not least <= value <= MAX_TOKENS:
        raise InputError(f"{name} is {value}: it must lie between {least} and {MAX_TOKENS}; nearest: {max(least, 1)}")
