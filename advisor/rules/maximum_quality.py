"""Maximum quality: uncompromising accuracy on short or middle context is the transformer's.

    strength = short · (1 - heavy) · need · (1 - 0.45 · signal)
    need = 0.5 + 0.3 accuracy + 0.1 reasoning + 0.1 recall + tools

Its edge at short range is exact recall, tools and the maturity of its training recipes. It is not perplexity: in controlled
comparisons hybrids are as good or better there, and the evidence below says so.
"""

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules.base import Evidence, Finding, Rule, Term, bounded, caches, load
from archcompass.advisor.units import say_length, say_tokens

EVIDENCE = (
    Evidence(
        claim="a fixed state cannot copy strings longer than its bits allow; transformers copy with two layers",
        number="state must grow with the string",
        source="Jelassi et al., Repeat After Me, arXiv 2402.01032",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="most of the gap between attention and gated convolution is recall of what stood before",
        number="82 % of the perplexity gap",
        source="Arora et al., Zoology, arXiv 2312.04927",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="on prompts below about 4k tokens the attention kernel beats the delta-rule kernel",
        number="0.346 ms against 0.753 ms at 2k tokens, GB200",
        source="flash-linear-attention benchmarks",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="attention replaced after training costs a little of the hardest reasoning",
        number="AIME24 .70 to .65, GPQA .59 to .55",
        source="Apriel-H1, arXiv 2511.02651",
        grade="C",
        effect="supports",
    ),
    Evidence(
        claim="half of the models that claim 32k tokens do not hold them",
        number="pass mark 85.6 at 32k",
        source="RULER, arXiv 2404.06654",
        grade="A",
        effect="refines",
    ),
    Evidence(
        claim="trained on the same data, a hybrid with 7 % attention beats the transformer on twelve short tasks",
        number="+2.65 points on average at 8B",
        source="Waleffe et al., arXiv 2406.07887",
        grade="A",
        effect="contradicts",
    ),
    Evidence(
        claim="perplexity is flat between 4 % and 23 % attention, and full attention is the worst of the row",
        number="8.26 to 8.32 against 8.68",
        source="Dao and Gu, Mamba-2, arXiv 2405.21060, table 2",
        grade="A",
        effect="contradicts",
    ),
)


def need(reading: Reading) -> float:
    """How much exactness and mature tools are wanted."""
    work = reading.workload
    tools = 0.1 * reading.mature + (0.15 if work.mode == "finetuning" else 0.0) + 0.05 * reading.reuse
    return min(1.0, 0.5 + 0.3 * reading.accuracy + 0.1 * reading.reasoning + 0.1 * reading.recall + tools)


def strength(reading: Reading) -> float:
    """short · (1 - heavy) · need · (1 - 0.45 · signal)"""
    return bounded(reading.short * (1.0 - reading.heavy) * need(reading) * (1.0 - 0.45 * reading.signal))


def explain(reading: Reading) -> Finding:
    """The rule's finding, with its arithmetic."""
    work = reading.workload
    edge = say_tokens(int(reading.short_edge))
    return Finding(
        rule="maximum-quality",
        family="transformer",
        strength=strength(reading),
        reason=_reason(reading),
        formula="short · (1 - heavy) · need · (1 - 0.45 · signal)",
        terms=(
            Term(
                name="short",
                input=f"{say_tokens(work.context)} read, {say_tokens(work.output)} written",
                function=f"half at {edge} tokens, a tenth at 2.8 times as many",
                value=reading.short,
                source="RULER, NoLiMa",
            ),
            Term(
                name="heavy",
                input=caches(reading),
                function="half at 1",
                value=reading.heavy,
                source="T_speed",
            ),
            Term(
                name="need",
                input=f"accuracy {work.accuracy}, reasoning {work.reasoning}, recall {work.recall}, {work.mode}",
                function="0.5 + 0.3 accuracy + 0.1 reasoning + 0.1 recall + tools",
                value=need(reading),
                source="arXiv 2402.01032, 2511.02651",
            ),
            Term(
                name="signal",
                input=work.modality,
                function="by modality",
                value=reading.signal,
                source="TiRex, SSM-Scope",
            ),
        ),
        evidence=EVIDENCE,
    )


def _reason(reading: Reading) -> str:
    work = reading.workload
    if reading.short < 0.5:
        return (
            f"short-range exactness and mature tools speak for a transformer, but you read {say_length(work.context)}"
        )
    if reading.heavy > 0.5:
        return f"each input is short, but the caches of {load(reading)} outweigh the weights"
    exact = "no error is allowed" if reading.accuracy == 1 else "attention forgets nothing it has read"
    return f"{say_tokens(work.context)} tokens are short, {exact}, and its tools are the most mature"


MAXIMUM_QUALITY = Rule("maximum-quality", "transformer", strength, explain)
