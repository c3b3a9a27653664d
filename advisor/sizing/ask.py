"""What a size must satisfy: requests for the ledger and the predictor, precisions allowed, times to meet, a cap on need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from archcompass.advisor.reading import Reading
from archcompass.advisor.units import say_bytes
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.request import Parallel, Request

MARGIN = 0.10
"""Share of a card's memory that stays free: vLLM's default, for captured graphs, growth and what a ledger cannot know."""

SHARED_MARGIN = 0.25
"""The same where the card's memory is the system's and all programs live in it (Apple lends an accelerator three quarters; of
its machines the table holds that share already)."""

ANSWER_SECONDS = {"low": 480.0, "medium": 480.0, "high": 480.0, "extreme": 1800.0}
"""Longest that a whole answer may take when no speed was asked for: minutes of reasoning are borne, hours are not."""

FEW = 8
"""Sequences at once up to which 4 bits serve well; beyond, arithmetic in 8 bits serves batches better (arXiv 2411.02355)."""

READING_WINDOW = {"language": 2**17, "signal": 2**14}
"""Tokens at which a sequence without end is sized: what a reader of language holds, and what a signal needs."""

TRAINING_SEGMENT = 2**12
"""Longest sequence of a training step that is assumed when the context is longer or has no end."""

FOUR = "int4"

LEAST_PARAMETERS = {"transformer": 3.5e8, "ssm": 1.3e8, "hybrid": 1.5e8, "hybrid with experts": 3e9, "moe": 3.2e9}
"""Smallest language model that is of use: about the smallest of each family that people run (SmolLM2 360M, Mamba 130M, Granite
3B-A800M; a hybrid of 90M exists, but it should be no smaller than what it would replace)."""

LEAST_SIGNAL_PARAMETERS = 1e4
"""Smallest model of a signal that is of use."""

NEED = {
    "extract": 1.2e9, "classify": 0.6e9, "embed": 0.6e9, "detect": 1e8, "forecast": 2e8, "control": 5e7,
    "transcribe": 1.6e9, "complete": 8e9,
}  # fmt: skip
"""Parameters beyond which published results hardly grow for a task: fine-tuned extractors and classifiers of 0.3-1B, embedders
of 0.3-0.6B, log detectors of 5M, TiRex 35M and TimesFM 200M, Whisper 1.5B. Reasoning widens it."""

READER = 8e9
"""Parameters of a reader that looks things up in documents; what it must know by heart they supply. Reasoning widens it: 32B
combines a few of them, 128B thinks over many."""

NEED_OF_REASONING = {"low": 1.0, "medium": 4.0, "high": 16.0, "extreme": 64.0}

NEED_OF_ACCURACY = {"standard": 1.0, "high": 2.0, "uncompromising": 4.0}
"""How many times larger a model is worth having where errors cost: judgement, a step of reasoning for the last word."""


GROWTH = 1.5
"""Sequences at once that a size must still hold, over those asked for: users grow (twofold a year is an expert's guess), and a
size that fits to the last byte is out of date before it is served."""

MOST_USERS_OF_RAM = 2
"""Sequences at once up to which experts may lie in system memory: each further one touches other experts."""

SPARE_RAM = 1.15
"""System memory over what experts take of it; with less the machine swaps (1.4 to 1.8 tokens/s were measured)."""

RAM_BYTES_PER_SECOND = {"desktop": 80e9, "server": 200e9}
"""Two channels of DDR5, which hold up to 192 GB; eight of DDR4 beyond."""


@dataclass(frozen=True)
class Ask:
    """A reading, as the search for a size sees it.

    Attributes:
        parallel: how several cards share the model.
        growth: how many times the sequences asked for are meant.
        slow: whether all experts are taken to lie in system memory, if any may.
    """

    reading: Reading
    parallel: Parallel = "tensor"
    growth: float = 1.0
    slow: bool = False

    @cached_property
    def grown(self) -> Ask:
        """The same question for the load that is to be expected: what a larger model must still hold."""
        return replace(self, growth=GROWTH) if self.serves and self.kind == "language" else self

    @property
    def hardware(self) -> Hardware:
        """The cards, `vram` applied."""
        return self.reading.hardware

    @cached_property
    def slowest(self) -> Ask:
        """The same question with as little on the cards as can be: what limits must allow for, however much memory there is."""
        return replace(self, slow=True) if self.ram_for_experts else self

    @property
    def memory_said(self) -> str:
        """The memory there is, in words: "24 GB", "80 GB on each card"."""
        return say_bytes(self.hardware.memory_bytes) + (" on each card" if self.hardware.count > 1 else "")

    @property
    def kind(self) -> str:
        """Whether the model reads language or a signal."""
        return "signal" if self.reading.signal > 0.5 else "language"

    @cached_property
    def serves(self) -> bool:
        """Whether the size is decided by running the model."""
        return self.reading.serves

    @cached_property
    def prompt(self) -> int:
        """Tokens of one sequence that are counted."""
        work = self.reading.workload
        whole = work.context if isinstance(work.context, int) else READING_WINDOW[self.kind]
        return (
            whole if self.serves else min(whole + work.output, TRAINING_SEGMENT if work.mode == "training" else whole)
        )

    @property
    def cache_precision(self) -> str | None:
        """fp8 caches where many sequences share a card that computes in fp8; else the activations'."""
        many = self.reading.workload.concurrency >= 16 and self.reading.accuracy < 1.0
        return "fp8" if many and "fp8" in self.hardware.flops else None

    def request(self, precision: str) -> Request:
        """The whole load."""
        work = self.reading.workload
        if not self.serves and work.mode == "training":
            return Request(
                batch=work.concurrency,
                prompt=self.prompt,
                generate=0,
                mode="training",
                recompute="full",
                parallel=self.parallel,
            )
        return Request(
            batch=ceil(work.concurrency * self.growth),
            prompt=self.prompt,
            generate=work.output,
            precision=precision,
            kv_precision=self.cache_precision if self.serves else None,
            parallel=self.parallel,
        )

    @cached_property
    def ram_for_experts(self) -> float:
        """Bytes of experts that system memory may hold: none for many users, in training, or where it is the card's own."""
        if not self.reading.experts_may_wait:
            return 0.0
        return (self.reading.workload.ram or 0) / SPARE_RAM

    @property
    def ram_bytes_per_second(self) -> float:
        """Bandwidth of system memory, which nobody states: read off how much there is."""
        return RAM_BYTES_PER_SECOND["server" if (self.reading.workload.ram or 0) > 192e9 else "desktop"]

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """Formats the weights may take, smallest first: the size is found with the first, then the best that fits is taken.

        4 bits lose little on short English text (arXiv 2411.02355) and much on long input (arXiv 2505.20276): past 64k tokens
        with high recall, without tolerance for errors, and for more than a few users at once the floor is 8 bits. Above 8 bits
        nothing is gained (fp8 is lossless) unless no error is allowed.
        """
        work, reading = self.reading.workload, self.reading
        if work.precision != "auto":
            return (work.precision,)
        if not self.serves:
            return (self._sixteen,) if work.mode == "training" or reading.accuracy == 1.0 else (FOUR,)
        if self.kind == "signal":
            return ("int8",)
        careful = reading.accuracy == 1.0 or work.concurrency > FEW
        careful = careful or (reading.alive >= 2**16 and reading.recall >= 0.8)
        ladder = [] if careful else [self._four]
        ladder.append(self._eight)
        if reading.accuracy == 1.0:
            ladder.append(self._sixteen)
        return tuple(ladder)

    @property
    def last_resort(self) -> str | None:
        """A smaller format that the evidence speaks against, for when nothing fits in the others; None where there is none."""
        spare = self.reading.workload.precision == "auto" and self.serves and self._four not in self.precisions
        return self._four if spare and self.kind == "language" else None

    @property
    def _sixteen(self) -> str:
        return "bf16" if "bf16" in self.hardware.flops else "fp16"

    @property
    def _eight(self) -> str:
        if self._runs_gguf:
            return "q8_0"
        return "fp8" if "fp8" in self.hardware.flops else "int8"

    @property
    def _four(self) -> str:
        if self._runs_gguf:
            return "q4_k_m"
        return "nvfp4" if "fp4" in self.hardware.flops and self.hardware.vendor == "NVIDIA" else "int4"

    @property
    def _runs_gguf(self) -> bool:
        """Processors and Apple's and small shared memories are served by llama.cpp's formats."""
        return self.hardware.is_cpu or self.hardware.vendor == "Apple" or self.hardware.kind == "apu"

    @property
    def capacity_bytes(self) -> float:
        """What may be held on one card."""
        return self.hardware.memory_bytes * (1.0 - self.margin)

    @property
    def margin(self) -> float:
        """Share of a card's memory that stays free."""
        return SHARED_MARGIN if self.hardware.kind == "edge" else MARGIN

    @cached_property
    def first_token_ms(self) -> float | None:
        """Time the first token may take after a whole prompt: what was asked, else what people bear, 2 s or a second per 2k
        tokens, of what is new in it."""
        work = self.reading.workload
        if not self.serves or work.stream:
            return None
        if work.ttft_ms is not None:
            return work.ttft_ms
        if work.tokens_per_second is None:
            return None
        return max(2000.0, self.prompt / 2048 * 1000.0) / self.reading.new_share

    @cached_property
    def step_ms(self) -> float | None:
        """Time one token, or one event of a stream, may take."""
        work = self.reading.workload
        if not self.serves:
            return None
        if self.per_event:
            return work.ttft_ms
        if work.tokens_per_second is None:
            return None
        usual = 1000.0 / work.tokens_per_second
        return (
            usual
            if self.asked("tokens_per_second")
            else min(usual, 1000.0 * ANSWER_SECONDS[work.reasoning] / work.output)
        )

    @property
    def per_event(self) -> bool:
        """Whether `ttft_ms` is the time for one event of a stream."""
        return self.reading.workload.stream and self.reading.workload.ttft_ms is not None

    def asked(self, key: str) -> bool:
        """Whether a limit is the user's own, so that missing it must be told."""
        return key in self.reading.workload.model_fields_set

    def is_users_own(self, limit: str) -> bool:
        """Whether the limit called `limit` in `misses` is the user's own."""
        return self.asked("ttft_ms" if limit == "ttft_ms" or self.per_event else "tokens_per_second")

    @cached_property
    def most_parameters(self) -> float:
        """A size beyond which the task gains nothing; infinite for open-ended language."""
        work = self.reading.workload
        needed = NEED.get(work.task)
        if needed is not None:
            needed *= NEED_OF_ACCURACY[work.accuracy]
        if needed is None and self.kind == "signal":
            return 7e9
        if needed is None and work.knowledge == "documents":
            needed = READER
        if needed is None:
            return float("inf")
        most = needed * NEED_OF_REASONING[work.reasoning]
        return most / 20 if self.kind == "signal" and self.hardware.is_cpu else most
