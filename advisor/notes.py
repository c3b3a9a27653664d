"""What an expert would say beside the answer: retrieval first, no language model needed, wishes that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from archcompass.advisor.decide import Veto
from archcompass.advisor.derived import HONEST_TOKENS, LOAD_IT_ALL_TOKENS
from archcompass.advisor.reading import Reading
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.search import Sized
from archcompass.advisor.sizing.shapes import Family
from archcompass.advisor.units import say_bytes, say_count, say_tokens
from archcompass.profiles.ledger import memory
from archcompass.profiles.request import Request

SMALLER = {
    "forecast": "Forecasting needs no language model: what is sized is a small model trained on series; compare a statistical "
    "baseline first.",
    "detect": "Detection needs no language model: what is sized is a small model of normal behaviour that scores surprise; "
    "tokenise by log template or value bin, not by words.",
    "classify": "Classification needs no decoder that writes: an encoder of 0.1 to 0.6B with a head is smaller and faster.",
    "embed": "Embedding needs no decoder that writes: an encoder of 0.1 to 0.6B serves.",
    "control": "Control needs no language model: what is sized is a small recurrent policy.",
}  # fmt: skip


def retrieval_first(reading: Reading) -> str | None:
    """The advice to search before reading, when the archive exceeds any honest context; None otherwise."""
    corpus, context = reading.workload.corpus, reading.workload.context
    if corpus is not None and corpus > LOAD_IT_ALL_TOKENS and (not isinstance(context, int) or corpus > context):
        return (
            f"Retrieval first: no context holds {say_tokens(corpus)} tokens honestly. Search the archive (index, then rerank) "
            f"and let the model read what was found; the advice is for that reader, at {say_tokens(context)} tokens."
        )
    if reading.signal <= 0.5 and isinstance(context, int) and context > HONEST_TOKENS:
        return (
            f"Retrieval first: no published model was shown to use {say_tokens(context)} tokens of text; beyond 1M search, "
            "then read less."
        )
    if reading.signal <= 0.5 and reading.workload.unbounded and reading.recall >= 0.8:
        return (
            "Retrieval first: an endless input that must be quoted belongs in a searchable index; the model reads what was "
            "found, and a small recurrent model may watch the stream."
        )
    return None


CARDS_OF_A_MACHINE = 8
"""Cards that fast links usually join (DGX, HGX)."""


def _machines(ask: Ask) -> str | None:
    """What is not in the times of more cards than one machine holds, and what to ask instead."""
    cards, users = ask.hardware.count, ask.reading.workload.concurrency
    if cards <= CARDS_OF_A_MACHINE or not ask.serves:
        return None
    copies = -(-cards // CARDS_OF_A_MACHINE)
    return (
        f"{cards} cards are usually {copies} machines of {CARDS_OF_A_MACHINE}: the slower links between them are not in these "
        f"times. What fits one machine serves more users in {copies} copies: ask for {CARDS_OF_A_MACHINE} cards and "
        f"{-(-users // copies)} of the {users:,} sequences."
    )


TRAINED_ON = 2048
"""Tokens of a sequence that a small model of a stream is trained on at a time."""


def _trained(ask: Ask, family: Family | None, sizes: Mapping[Family, Sized]) -> str | None:
    """What training takes, where a model is sized by running it and trained all the same."""
    if ask.reading.workload.mode != "training" or not ask.serves or family is None:
        return None
    step = Request(batch=1, prompt=TRAINED_ON, generate=0, mode="training", recompute="full")
    held = memory(sizes[family].spec, step, ask.hardware).total_bytes
    where = "here too" if held <= ask.capacity_bytes else "on a larger card"
    return (
        f"Sized to run here, at {sizes[family].precision}. It is trained in 16 bits {where}: one sequence of "
        f"{say_tokens(TRAINED_ON)} tokens at a time takes {say_bytes(held)}, activations computed twice."
    )


def notes(ask: Ask, family: Family | None, sizes: Mapping[Family, Sized]) -> list[str]:
    """Everything worth a sentence, most important first."""
    reading = ask.reading
    said = [retrieval_first(reading), SMALLER.get(reading.workload.task)]
    said += [
        _platform(reading),
        _text_on_a_state(reading, family),
        _window_only(sizes, family),
        _stands_in(ask, family, sizes),
        _from_nothing(reading, family),
        _machines(ask),
        _trained(ask, family, sizes),
        _offload(reading, sizes),
    ]
    return [sentence for sentence in said if sentence]


def contradictions(
    ask: Ask, family: Family | None, sizes: Mapping[Family, Sized], vetoes: Sequence[Veto] = ()
) -> list[str]:
    """Wishes that pull apart, told and not averaged."""
    reading, work = ask.reading, ask.reading.workload
    said: list[str | None] = [_breadth_without_room(reading, sizes), _careful_in_four_bits(ask, family, sizes)]
    said += [veto.reason_first for veto in vetoes if veto.family == family]
    if reading.endless == 1.0 and work.recall == "exact":
        said.append(
            "The input never ends, yet it must be quoted exactly: a fixed state cannot, so keep an index beside the model."
        )
    if family == "hybrid" and reading.reuse:
        said.append(
            "Prompts come again and again, but caching prefixes of recurrent state is young: test the engine's hit rate first."
        )
    if family == "moe" and work.mode == "finetuning":
        said.append("Adapters on experts are fragile: keep the router frozen, or fine-tune a dense model.")
    if work.knowledge == "weights" and work.corpus is not None:
        said.append(
            "Knowledge is to be in the weights, yet there is an archive: weights age and cannot be cited; retrieval can."
        )
    if family == "ssm" and reading.reasoning >= 2 / 3:
        said.append(
            "Hard reasoning over a constant state is unproven: no pure state space model above 8B was trained for it."
        )
    return [*[sentence for sentence in said if sentence], *_missed(ask, family, sizes)]


def _missed(ask: Ask, family: Family | None, sizes: Mapping[Family, Sized]) -> list[str]:
    """Limits the user set that even the pick does not meet."""
    if family is None:
        return []
    what = {"ttft_ms": "the first token", "step_ms": "an event" if ask.per_event else "each token"}
    limits = {"ttft_ms": ask.first_token_ms, "step_ms": ask.step_ms}
    return [
        f"The limit of {limits[name]:,.4g} ms for {what[name]} is missed {factor:.2g}-fold even by this {family}."
        for name, factor in sizes[family].misses.items()
        if ask.is_users_own(name)
    ]


def _breadth_without_room(reading: Reading, sizes: Mapping[Family, Sized]) -> str | None:
    total = sizes["moe"].spec.parameters().total
    if reading.closed_book < 0.5 or (sizes["moe"].fits and (total > 2.5e10 or sizes["moe"].bound != "memory")):
        return None
    held = (
        f"fits only up to {say_count(total)} in all at {sizes['moe'].precision}"
        if sizes["moe"].fits
        else "does not fit at all"
    )
    return (
        f"{reading.workload.breadth.capitalize()} breadth on {say_bytes(reading.hardware.total_memory_bytes)}: a mixture of "
        f"experts {held}; consider retrieval."
    )


def _careful_in_four_bits(ask: Ask, family: Family | None, sizes: Mapping[Family, Sized]) -> str | None:
    if family is None or not sizes[family].last_resort:
        return None
    return (
        f"Only {sizes[family].precision} fits, where the evidence asks for 8 bits (long exact input, many users or no "
        "tolerance for errors): test it on your own data."
    )


def _platform(reading: Reading) -> str | None:
    machine = reading.hardware
    if machine.vendor in ("NVIDIA", "") or machine.is_cpu:
        return None
    slower = "llama.cpp without one was 2.1 times slower"
    return f"{machine.name}: kernels of recurrent layers are least mature off NVIDIA; {slower}."


def _text_on_a_state(reading: Reading, family: Family | None) -> str | None:
    if family != "ssm" or reading.signal > 0.5:
        return None
    return "No production-grade pure state space language model above 8B is public: expect to train, or take a hybrid."


def _window_only(sizes: Mapping[Family, Sized], family: Family | None) -> str | None:
    if family is None or sizes[family].style.window is None:
        return None
    style = sizes[family].style
    full = f"one layer in {style.full_every} sees everything" if style.full_every else "what is older is forgotten"
    return f"Its attention has windows of {say_tokens(style.window or 0)} tokens; {full}."


def _offload(reading: Reading, sizes: Mapping[Family, Sized]) -> str | None:
    """What of the system memory given is used, and at what price."""
    work = reading.workload
    if work.ram is None or reading.signal > 0.5:
        return None
    if not reading.experts_may_wait:
        return (
            f"The {say_bytes(work.ram)} of system memory are not counted on: experts may lie there for one or two users of a "
            "card that has memory of its own, since every further user touches other experts."
        )
    sized = sizes["moe"]
    if not sized.request.offload:
        return "The experts fit on the card, so none lies in system memory."
    return (
        f"{sized.request.offload:.0%} of the experts of the mixture ({say_bytes(sized.memory.system_bytes)}) lie in system "
        f"memory, taken to bring {say_bytes(sized.request.ram_bytes_per_second)}/s: llama.cpp runs it so. Prompts are slow; "
        "gpt-oss-120b with 8 GB on the card was measured at 25.6 tokens/s, and 134 read."
    )


def _stands_in(ask: Ask, family: Family | None, sizes: Mapping[Family, Sized]) -> str | None:
    """What memory the family would need that this one stands in for."""
    if family is None or sizes[family].bound != "stopgap":
        return None
    needed = min(
        (sized.memory.per_card_bytes / (1.0 - ask.margin), name) for name, sized in sizes.items() if not sized.fits
    )
    where = "on each card" if ask.hardware.count > 1 else "of memory"
    return (
        f"This {family} only stands in, as small as may be, for what does not fit: the smallest useful {needed[1]} would need "
        f"{say_bytes(needed[0])} {where} for this load."
    )


def _from_nothing(reading: Reading, family: Family | None) -> str | None:
    if reading.workload.mode != "training" or family != "transformer" or reading.signal > 0.5:
        return None
    return (
        "Trained from nothing, a hybrid learns at least as fast (Olmo Hybrid: equal MMLU with 49 % fewer tokens); the "
        "transformer comes first here for short range, recipes and tools."
    )
