"""Infinite memory: sequences without end, and signals, are a state space model's.

    strength = (1 - veto) · max(endless · (0.7 + 0.25 signal), 0.9 · long · signal, signal at any length) · tools

True for cost: the state is flat. False for anything that needs exact lookup, which is why recall takes it away.
"""

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules.base import Evidence, Finding, Rule, Term, bounded
from archcompass.advisor.units import say_length, say_tokens

FORGETS = {"none": 0.0, "low": 0.1, "medium": 0.4, "high": 0.85, "exact": 1.0}
"""What a need for recall takes away. Pure Mamba: 9 % of BABILong at 4k, IMDB 48.8 against 84.1 for attention."""

EVIDENCE = (
    Evidence(
        claim="the state is constant and worth this many tokens of a modern cache",
        number="190 to 2,108 tokens of Llama 3.1 8B",
        source="computed from published configurations",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="on long prompts a recurrence is several times faster and holds several times more on the same card",
        number="up to 4x to the first token at 57k, 220k tokens on 24 GB; 370 J against 1,492 J",
        source="SSM-Scope, arXiv 2507.12442",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="below 8k tokens transformers are the faster ones",
        number="up to 1.9x",
        source="SSM-Scope, arXiv 2507.12442",
        grade="A",
        effect="contradicts",
    ),
    Evidence(
        claim="a small recurrent model detects anomalies in a stream of logs",
        number="4.9M parameters, F1 0.9975 on HDFS",
        source="open project report",
        grade="B",
        effect="supports",
    ),
    Evidence(
        claim="a small recurrent model leads zero-shot forecasting",
        number="35M parameters ahead of Chronos-Bolt, TimesFM and Moirai on GIFT-Eval",
        source="TiRex",
        grade="B",
        effect="supports",
    ),
    Evidence(
        claim="parsing logs of many formats is won by attention, at a price",
        number="edit distance 0.111 against 0.145",
        source="arXiv 2602.07698",
        grade="A",
        effect="contradicts",
    ),
    Evidence(
        claim="long questions over text collapse first",
        number="Mamba 2.8B on BABILong at 0, 1k, 2k, 4k, 8k: 70, 52, 35, 9, 0",
        source="BABILong leaderboard",
        grade="A",
        effect="contradicts",
    ),
    Evidence(
        claim="length does not generalise for free: the state over-fits to the lengths it was trained on",
        number="500 more steps extend to 256k",
        source="Stuffed Mamba, arXiv 2410.07145",
        grade="A",
        effect="refines",
    ),
)


def ground(reading: Reading) -> float:
    """How far the workload is one a constant state serves."""
    endless = reading.endless * (0.7 + 0.25 * reading.signal)
    return max(endless, 0.9 * reading.long * reading.signal, reading.signal_at_any_length)


def tools(reading: Reading) -> float:
    """What young tools leave of it."""
    work = reading.workload
    ready = (1.0 - 0.3 * reading.mature) * (1.0 - 0.2 * reading.reuse) * (0.7 if work.mode == "finetuning" else 1.0)
    return ready * (1.0 - 0.25 * reading.accuracy * (1.0 - reading.endless))


def strength(reading: Reading) -> float:
    """(1 - veto) · ground · tools"""
    return bounded((1.0 - FORGETS[reading.workload.recall]) * ground(reading) * tools(reading))


def explain(reading: Reading) -> Finding:
    """The rule's finding, with its arithmetic."""
    work = reading.workload
    return Finding(
        rule="infinite-memory",
        family="ssm",
        strength=strength(reading),
        reason=_reason(reading),
        formula="(1 - veto) · ground · tools",
        terms=(
            Term(
                name="veto",
                input=f"recall {work.recall}",
                function="none 0, low 0.1, medium 0.4, high 0.85, exact 1",
                value=FORGETS[work.recall],
                source="arXiv 2402.01032, BABILong, Jamba",
            ),
            Term(
                name="ground",
                input=f"{say_tokens(work.context)} tokens of {work.modality}" + (", a stream" if work.stream else ""),
                function="max(endless · (0.7 + 0.25 signal), 0.9 · long · signal, signal at any length)",
                value=ground(reading),
                source="SSM-Scope, TiRex",
            ),
            Term(
                name="tools",
                input=f"ecosystem {work.ecosystem}, prefix reuse {work.prefix_reuse}, {work.mode}, accuracy {work.accuracy}",
                function="less where tools must be mature, prompts come again, it is fine-tuned, or no error is allowed",
                value=tools(reading),
                source="vLLM issues on prefix caching of recurrent state",
            ),
        ),
        evidence=EVIDENCE,
    )


def _reason(reading: Reading) -> str:
    work = reading.workload
    length = say_length(work.context)
    if FORGETS[work.recall] >= 0.85:
        return (
            f"a constant state would be cheap, but recall is {work.recall} and a fixed state cannot be trusted to quote"
        )
    if reading.endless == 1.0:
        kind = f"a stream of {work.modality}" if reading.signal > 0.5 else "the input"
        return f"{kind} never ends: a constant state costs the same at every step, a cache grows until it breaks"
    if reading.signal > 0.5:
        return f"{length} of {work.modality}: small recurrent models are the best or the cheapest on such signals"
    if reading.endless > 0.3:
        return f"{length} cost a recurrence time in proportion and no memory, but over text it loses the thread"
    return f"{length} are too short for a constant state to pay: below 8k tokens attention is faster and exact"


INFINITE_MEMORY = Rule("infinite-memory", "ssm", strength, explain)
