"""What is assumed when the user does not say, and why.

A default may lean on what kind of work it is (task, modality, stream, mode), never on how much of it there is (context,
breadth, memory): else a longer context could change another answer behind the user's back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from archcompass.advisor.units import UNBOUNDED

SIGNALS = frozenset({"logs", "time-series", "sensors", "audio", "genome"})
"""Modalities that are measured rather than written."""

INTERACTIVE = frozenset({"chat", "qa", "rag", "agent", "code", "complete", "reason", "summarize", "translate", "write"})
"""Tasks where a person or an agent waits for the next token."""

_MODALITY = {"transcribe": "audio", "forecast": "time-series", "control": "sensors", "detect": "logs"}
_MODALITY |= {"code": "code", "complete": "code"}

_OUTPUT = {"reason": 8192, "code": 1000, "agent": 1000, "complete": 64, "write": 2000, "classify": 16, "forecast": 64}
_OUTPUT |= {"detect": 1, "embed": 1, "control": 1, "extract": 100, "generate": 1000}

_RECALL = {"rag": "high", "extract": "high", "code": "high", "complete": "high", "agent": "high", "translate": "high"}
_RECALL |= {"write": "low", "embed": "low", "classify": "low", "generate": "low", "transcribe": "low"}
_RECALL |= {"detect": "none", "forecast": "none", "control": "none"}

_REASONING = {"reason": "extreme", "code": "high", "agent": "high"}
_REASONING |= dict.fromkeys(("chat", "qa", "rag", "summarize", "write"), "medium")


class Default(NamedTuple):
    """A value nobody gave, and the reason it was taken."""

    value: Any
    reason: str


def defaults(given: Mapping[str, Any]) -> dict[str, Default]:
    """Every key of a workload with what is taken for it when it is not in `given`."""
    task = given.get("task", "chat")
    modality = given.get("modality", _MODALITY.get(task, "text"))
    return _kind_of_work(task, modality, given) | _load(task, modality, given) | _machine()


def _kind_of_work(task: str, modality: str, given: Mapping[str, Any]) -> dict[str, Default]:
    signal = modality in SIGNALS and task not in INTERACTIVE
    stream = bool(given.get("stream")) or given.get("context") == UNBOUNDED
    documents = task in ("rag", "extract", "summarize", "translate") or given.get("corpus") is not None
    return {
        "task": Default("chat", "the most common work"),
        "modality": Default(modality, f"usual for {task}"),
        "stream": Default(given.get("context") == UNBOUNDED, "a request ends unless the context is unbounded"),
        "breadth": Default("narrow" if signal else "moderate", "one signal" if signal else "three to five subjects"),
        "knowledge": Default(
            "documents" if documents or signal else "both",
            "the input holds what is needed" if documents or signal else "some from the weights, some from documents",
        ),
        "recall": _recall(task, signal, stream),
        "reasoning": Default(_REASONING.get(task, "low"), f"usual for {task}"),
        "accuracy": Default("standard", "no error was said to be costly"),
    }


def _recall(task: str, signal: bool, stream: bool) -> Default:
    if signal and task != "transcribe":
        return Default("none", "signals are seldom quoted")
    if stream:
        return Default("low", "what a stream said long ago is seldom quoted")
    return Default(_RECALL.get(task, "medium"), f"usual for {task}: how exactly it must repeat what it has read")


def _load(task: str, modality: str, given: Mapping[str, Any]) -> dict[str, Default]:
    signal, stream = modality in SIGNALS and task not in INTERACTIVE, bool(given.get("stream"))
    training = given.get("mode", "inference") != "inference"
    waits = task in INTERACTIVE and not training
    return {
        "context": Default(
            UNBOUNDED if stream else 16384,
            "a stream does not end" if stream else "95 of 100 requests are shorter when nobody measured",
        ),
        "output": Default(_OUTPUT.get(task, 500), f"usual for {task}"),
        "corpus": Default(None, "no archive was named"),
        "concurrency": Default(
            1 if signal or training or stream else 8,
            "one at a time"
            if signal or training or stream
            else "sequences alive at once, about 3 % of registered users",
        ),
        "ttft_ms": Default(None, "no limit was asked; the time of the prompt is printed"),
        "tokens_per_second": Default(
            20.0 if waits else None, "a little faster than people read" if waits else "nobody waits for each token"
        ),
        "prefix_reuse": Default(
            "high" if task == "agent" else "low",
            "agents send their history again and again" if task == "agent" else "requests share little",
        ),
        "mode": Default("inference", "most people run a model"),
    }


def _machine() -> dict[str, Default]:
    return {
        "gpu": Default("rtx-4090", "a common card of 24 GB"),
        "vram": Default(None, "what the card has"),
        "ram": Default(None, "not given, so no expert is kept in system memory"),
        "precision": Default("auto", "the best that fits"),
        "ecosystem": Default("any", "young tools are accepted"),
    }
