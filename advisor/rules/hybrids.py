"""Hybrids: deep knowledge, long context and exact reasoning at once.

    strength = tall · (0.5 + 0.2 experts + 0.2 recall + 0.1 reasoning) · tools

A few layers of attention keep recall, the rest keep the memory flat. The best supported rule since 2025.
"""

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules.base import Evidence, Finding, Rule, Term, bounded, caches, load
from archcompass.advisor.rules.bottomless_knowledge import expert_core
from archcompass.advisor.units import say_tokens

EVIDENCE = (
    Evidence(
        claim="the cache shrinks several times at equal quality",
        number="256k tokens: 32 GB for Llama 3.1 8B, 4 GB for Jamba 1.5 Mini",
        source="Jamba 1.5, arXiv 2408.12570, table 1",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="long context is really used",
        number="RULER at 128k: Jamba 1.5 Large 95.1, Llama 3.1 70B 66.6",
        source="RULER results table",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="recall needs a share of attention between 1/7 and 1/4, and no more",
        number="recall 0.256 with none, 0.390 at 6:1, 0.397 at 3:1, 0.423 all attention; 72 models",
        source="arXiv 2507.06457",
        grade="A",
        effect="refines",
    ),
    Evidence(
        claim="with the same data it learns faster than a transformer, and lasts at length",
        number="MMLU parity with 49 % fewer tokens; RULER at 64k 85.0 against 70.9; mixed after post-training",
        source="Olmo Hybrid",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="several needles at once are found less surely than by full attention at 128k",
        number="MRCR of Kimi Linear, 8 needles: 54.9; Gemini 3: 73.0",
        source="Context Arena",
        grade="A",
        effect="refines",
    ),
    Evidence(
        claim="caching shared prefixes of recurrent state is young",
        number="0 hits of 6,211 queries in one report",
        source="vLLM issues 26201, 51250",
        grade="A",
        effect="contradicts",
    ),
    Evidence(
        claim="one lab went back to full and then to sparse attention for agents",
        number="sliding windows: RULER at 128k from 90.0 to 72.0",
        source="MiniMax M1, M2, M3",
        grade="C",
        effect="contradicts",
    ),
    Evidence(
        claim="vendors' ratios shrink in other hands",
        number="2.2x became 1.8x, 1.1x and once a quarter",
        source="Artificial Analysis and users, Nemotron 3 Super",
        grade="B",
        effect="refines",
    ),
)


def demands(reading: Reading) -> float:
    """How much is asked at once: facts, exactness, thought. Of the cards as sold, so that memory turns nothing but experts' own
    rule: a hybrid needs little of it."""
    return 0.5 + 0.2 * expert_core(reading.as_sold) + 0.2 * reading.recall + 0.1 * reading.reasoning


def tools(reading: Reading) -> float:
    """What two kinds of layers leave of it where tools are young."""
    work = reading.workload
    return (1.0 - 0.15 * reading.mature) * (1.0 - 0.25 * reading.reuse) * (0.9 if work.mode == "finetuning" else 1.0)


def strength(reading: Reading) -> float:
    """tall · demands · tools"""
    return bounded(reading.tall * demands(reading) * tools(reading))


def explain(reading: Reading) -> Finding:
    """The rule's finding, with its arithmetic."""
    work = reading.workload
    return Finding(
        rule="hybrids",
        family="hybrid",
        strength=strength(reading),
        reason=_reason(reading),
        formula="tall · demands · tools",
        terms=(
            Term(
                name="tall",
                input=f"{say_tokens(work.context)} tokens x {work.concurrency:,}; {caches(reading)}",
                function="1 - (1 - long)(1 - heavy); long is half at 64k, heavy half at 1",
                value=reading.tall,
                source="T_speed; RULER",
            ),
            Term(
                name="demands",
                input=f"breadth {work.breadth}, recall {work.recall}, reasoning {work.reasoning}",
                function="0.5 + 0.2 experts + 0.2 recall + 0.1 reasoning",
                value=demands(reading),
                source="arXiv 2403.19887, 2507.06457",
            ),
            Term(
                name="tools",
                input=f"ecosystem {work.ecosystem}, prefix reuse {work.prefix_reuse}, {work.mode}",
                function="less where tools must be mature, prompts come again, or it is fine-tuned",
                value=tools(reading),
                source="vLLM issues on prefix caching of recurrent state",
            ),
        ),
        evidence=EVIDENCE,
    )


def _reason(reading: Reading) -> str:
    work, what = reading.workload, load(reading)
    if reading.tall < 0.5:
        return f"{what} are within reach of plain attention; two kinds of layers would buy little"
    if work.unbounded:
        burden = f"{what} outweigh" + ("s" if work.concurrency == 1 else "") + " the weights"
    else:
        burden = f"{what} " + (
            "outweigh the weights" if reading.heavy > 0.5 else "are more than full attention holds well"
        )
    if work.unbounded and reading.recall < 0.8:
        return f"{burden}: a constant state carries the past, windows of attention look up what is recent"
    if work.recall in ("high", "exact"):
        must = "be exact" if work.recall == "exact" else "quote what was read"
        return f"{burden}, and answers must {must}: a few attention layers look up, the rest stay flat"
    return f"{burden}: a few attention layers keep the recall, the rest keep the memory flat"


HYBRIDS = Rule("hybrids", "hybrid", strength, explain)
