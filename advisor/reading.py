"""What the rules read off a workload and a machine: lengths, loads and needs as numbers between 0 and 1.

Every edge is soft, `soft(x, edge, octaves) = 1 / (1 + exp((log2 edge - log2 x) / octaves))`: half at the edge. What grows with
context, concurrency or breadth only grows, so a longer context can never speak for a quadratic mixer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, log2

from archcompass.advisor.defaults import INTERACTIVE
from archcompass.advisor.workload import Workload
from archcompass.profiles.hardware import Hardware, find, with_memory

ENDLESS_TOKENS = 2**33
"""Tokens that stand for a sequence without end."""

SHORT_EDGE = 2**15
"""Tokens where "short" is half true: 32k (RULER: half of the models that claim 32k do not hold it)."""

LONG_EDGE = 2**16
"""Tokens where a hybrid's long context is half true: 64k, one octave later, since both kinds serve in between."""

VERY_LONG_EDGE = 2**19
"""Tokens where a finite sequence is half as good as endless."""

WIDTH = 0.7
"""Octaves over which an edge is soft: half at 32k, a tenth at about 90k."""

CACHE_BYTES_PER_TOKEN = {"language": 131_072.0, "signal": 8_192.0}
"""Cache of the dense model a reader knows: 32 layers of 8 key heads of 128 channels in 16 bits (Llama 3.1 8B); for signals a
small one of 8 layers of 2 heads of 128."""

KNOWLEDGE = {"narrow": 0.05, "moderate": 0.25, "broad": 0.7, "encyclopedic": 1.0}
CLOSED_BOOK = {"weights": 1.0, "both": 0.85, "documents": 0.5}
RECALL = {"none": 0.0, "low": 0.15, "medium": 0.45, "high": 0.8, "exact": 1.0}
REASONING = {"low": 0.0, "medium": 1 / 3, "high": 2 / 3, "extreme": 1.0}
ACCURACY = {"standard": 0.0, "high": 0.5, "uncompromising": 1.0}

SIGNAL = {"time-series": (1.0, 0.6), "sensors": (1.0, 0.6), "audio": (0.9, 0.35), "logs": (0.85, 0.3)}
SIGNAL |= {"genome": (0.7, 0.3), "video": (0.4, 0.1), "images": (0.2, 0.0), "text": (0.0, 0.0), "code": (0.0, 0.0)}
"""(how far a modality is a measured signal, how far a recurrence wins on it at any length). The second from TiRex on
GIFT-Eval for time series; less for audio and logs, where attention still wins short tasks."""

SMALL_TASKS = frozenset({"extract", "classify", "embed", "detect", "forecast", "control", "transcribe", "complete"})
"""Tasks that small models do as well as large ones."""

PATIENT_MEMORY = 4.0
"""How much more of the memory caches may take where no error is allowed."""

ENCODES = frozenset({"embed", "classify"})
"""Tasks that read a text once and write nothing."""

NEW_SHARE = 0.2
"""Share of a prompt that is new where prompts come again, or a conversation goes on: its past is kept."""

CONVERSES = frozenset({"chat", "agent", "complete"})
"""Tasks whose prompts are mostly what was there a moment ago."""

THINKING = 4.0
"""How many times longer a user takes from one request to the next than the answer takes: it is read before the next comes."""

ROOM_EDGE_BYTES = 12e9
"""Memory where "there is room for many experts" is half true."""

POOR_EDGE = 4.0
"""How many times the card's memory exceeds what a dense model could read per token at the speed asked for."""

USUAL_TOKENS_PER_SECOND = 20.0

USUAL_READER = 8e9
"""Parameters of the dense model a reader knows (Llama 3.1 8B)."""

USUAL_MFU = 0.5
"""Share of the data sheet's FLOP/s that reading a prompt reaches."""

SHARED_MEMORY = frozenset({"edge", "apple", "apu"})
"""Kinds of accelerators whose memory is the system's."""


def soft(value: float, edge: float, octaves: float = WIDTH) -> float:
    """How far `value` lies above `edge`: 0 to 1, half at the edge. Both positive."""
    return 1.0 / (1.0 + exp(min(60.0, (log2(edge) - log2(value)) / octaves)))


@dataclass(frozen=True)
class Reading:
    """A workload on a machine, as the rules see it.

    Attributes:
        workload: what is wanted.
        hardware: the cards, `vram` already applied.
        card: the cards as sold; what a style is decided on, so that memory changes sizes and not styles.
    """

    workload: Workload
    hardware: Hardware
    card: Hardware

    @classmethod
    def of(cls, workload: Workload) -> Reading:
        """The workload on the machine it names.

        Raises:
            UnknownNameError: no card is called so.
            InputError: an impossible count of cards.
        """
        card = find(workload.gpu)
        return cls(workload, with_memory(card, workload.vram) if workload.vram else card, card)

    @cached_property
    def as_sold(self) -> Reading:
        """The same workload on the cards as sold, whatever memory was given."""
        return self if self.hardware is self.card else replace(self, hardware=self.card)

    @property
    def context(self) -> int:
        """Tokens of the input; a very large number when it never ends."""
        return self.workload.context if isinstance(self.workload.context, int) else ENDLESS_TOKENS

    @property
    def length(self) -> float:
        """Tokens that count as read: the input, and half of what is written, which is its own and easier to follow."""
        return self.context + self.workload.output / 2

    @property
    def alive(self) -> int:
        """Tokens of one sequence in memory at its end."""
        return self.context + self.workload.output

    @property
    def accuracy(self) -> float:
        """How costly an error is."""
        return ACCURACY[self.workload.accuracy]

    @property
    def recall(self) -> float:
        """How exactly earlier tokens must be repeated."""
        return RECALL[self.workload.recall]

    @property
    def reasoning(self) -> float:
        """How many steps it must think."""
        return REASONING[self.workload.reasoning]

    @property
    def short_edge(self) -> float:
        """Tokens up to which a sequence is short; an octave more when no error is allowed, since attention forgets nothing."""
        return float(SHORT_EDGE * 2**self.accuracy)

    @cached_property
    def short(self) -> float:
        """How short one sequence is."""
        return 1.0 - soft(self.length, self.short_edge)

    @cached_property
    def long(self) -> float:
        """How far one sequence is past the edge where hybrids begin."""
        return soft(self.length, LONG_EDGE * 2 ** (self.accuracy / 2))

    @cached_property
    def cache_share(self) -> float:
        """Time that reading the caches of all sequences takes, over the time a token may take. A plain number, not 0 to 1."""
        return self.cache_bytes / self.bytes_per_token_time

    @cached_property
    def held_share(self) -> float:
        """The caches of all sequences over half the memory of the cards as sold. A plain number, not 0 to 1."""
        return self.cache_bytes / (self.card.total_memory_bytes / 2)

    @cached_property
    def cache_bytes(self) -> float:
        """What all sequences would keep in the cache of a usual dense model."""
        kind = "signal" if self.signal > 0.5 else "language"
        return self.workload.concurrency * self.alive * CACHE_BYTES_PER_TOKEN[kind]

    @cached_property
    def heavy(self) -> float:
        """How far the caches of all sequences outweigh the rest: half when reading them takes all the time there is, or when
        they fill half the memory (twice it where no error is allowed: who wants that takes another card). Training keeps no
        cache, and neither does what reads a text once and writes nothing."""
        if not self.keeps_cache:
            return 0.0
        return soft(max(self.cache_share, self.held_share / PATIENT_MEMORY**self.accuracy), 1.0)

    @property
    def keeps_cache(self) -> bool:
        """Whether what was read is kept until something is written."""
        return self.serves and self.workload.task not in ENCODES

    @property
    def serves(self) -> bool:
        """Whether running the model decides. A stream or a time limit is met by running, even where it is trained."""
        work = self.workload
        return work.mode == "inference" or (work.mode == "training" and (work.stream or work.ttft_ms is not None))

    @cached_property
    def tall(self) -> float:
        """Long or heavy: the tokens in memory outweigh the weights."""
        return 1.0 - (1.0 - self.long) * (1.0 - self.heavy)

    @cached_property
    def endless(self) -> float:
        """How far the input has no end."""
        if self.workload.stream or self.workload.unbounded:
            return 1.0
        return 0.9 * soft(self.context, VERY_LONG_EDGE)

    @property
    def language_task(self) -> bool:
        """Whether words are read and written, whatever they speak of."""
        return self.workload.task in INTERACTIVE or self.workload.task == "extract"

    @property
    def signal(self) -> float:
        """How far the input is measured rather than written; questions asked about logs are language."""
        return 0.0 if self.language_task else SIGNAL[self.workload.modality][0]

    @property
    def signal_at_any_length(self) -> float:
        """How far a recurrence wins on this signal even when it is short."""
        return 0.0 if self.language_task else SIGNAL[self.workload.modality][1]

    @property
    def closed_book(self) -> float:
        """How much must be known by heart: breadth, less where documents supply it."""
        return KNOWLEDGE[self.workload.breadth] * CLOSED_BOOK[self.workload.knowledge]

    @property
    def tokens_per_second(self) -> float:
        """What each user is to see."""
        return self.workload.tokens_per_second or USUAL_TOKENS_PER_SECOND

    @property
    def bytes_per_token_time(self) -> float:
        """Bytes all cards can read in the time one token may take."""
        return self.hardware.bandwidth_bytes_per_second * self.hardware.count / self.tokens_per_second

    @property
    def experts_may_wait(self) -> bool:
        """Whether experts may lie in system memory: one or two users of a card that has memory of its own."""
        work = self.workload
        shared = self.hardware.is_cpu or self.hardware.kind in SHARED_MEMORY
        few = work.concurrency <= 2 and work.mode == "inference"
        return work.ram is not None and few and not shared and self.signal <= 0.5

    @property
    def memory_for_experts(self) -> float:
        """Bytes that experts may lie in: of all cards, and what is given of system memory."""
        return self.hardware.total_memory_bytes + (self.workload.ram or 0) * self.experts_may_wait

    @cached_property
    def room(self) -> float:
        """How far the memory holds many experts."""
        return soft(self.memory_for_experts, ROOM_EDGE_BYTES)

    @property
    def memory_over_speed(self) -> float:
        """Memory over what can be read in the time of a token: above 1 a dense model that fills it is too slow."""
        return self.memory_for_experts / self.bytes_per_token_time

    @cached_property
    def poor(self) -> float:
        """How rich in memory and poor in bandwidth the machine is."""
        return soft(self.memory_over_speed, POOR_EDGE)

    @cached_property
    def card_is_poor(self) -> float:
        """`poor`, of the card as sold."""
        return soft(self.card.total_memory_bytes / self.bytes_per_token_time, POOR_EDGE)

    @cached_property
    def reading_share(self) -> float:
        """Time a usual dense model spends on the prompts of the others while it writes one token, over the time a token may
        take, if all keep asking. A plain number, not 0 to 1."""
        work, card = self.workload, self.card
        if work.stream or not self.keeps_cache:
            return 0.0
        prompts = (work.concurrency - 1) * self.context * self.new_share / work.output
        flops = card.rate("bf16") * card.count * USUAL_MFU
        return prompts * 2 * USUAL_READER / flops * self.tokens_per_second

    @cached_property
    def want_of_experts(self) -> float:
        """How much experts would bring, were there room: facts, and speed where bandwidth is scarce."""
        scarce = self.poor if self.open_ended else 0.0
        return self.closed_book + (1.0 - self.closed_book) * 0.6 * scarce

    @property
    def open_ended(self) -> bool:
        """Whether a larger model keeps serving the task better, so that much memory is worth filling."""
        return self.workload.task not in SMALL_TASKS

    @property
    def reuse(self) -> float:
        """Whether prompts come again, which caches of attention serve and recurrent state hardly does."""
        return 1.0 if self.workload.prefix_reuse == "high" else 0.0

    @property
    def new_share(self) -> float:
        """Share of a prompt that must be read anew."""
        return NEW_SHARE if self.reuse or self.workload.task in CONVERSES else 1.0

    @property
    def mature(self) -> float:
        """Whether only well-worn tools are accepted."""
        return 1.0 if self.workload.ecosystem == "mature" else 0.0
