"""Bottomless knowledge: questions from many unrelated fields want a mixture of experts.

    strength = room · want · patience · (1 - 0.3 · accuracy) · mode · (1 - signal)
    patience = (1 - 0.4 · tall · (1 - 0.5 · reuse)) · (1 - 0.6 · endless)
    want = closed_book + (1 - closed_book) · 0.6 · poor

Facts follow all parameters, reasoning the active ones: experts buy facts, and speed where memory is plenty and bandwidth
scarce. Their price is that every expert lies in memory.
"""

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules.base import Evidence, Finding, Rule, Term, bounded
from archcompass.advisor.units import say_bytes

EVIDENCE = (
    Evidence(
        claim="experts raise what is memorised; reasoning follows width and active parameters",
        number="world knowledge tracks total parameters",
        source="Jelassi et al., Mixture of Parrots, arXiv 2410.19034",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="at equal compute a mixture of experts equals a dense model several times its active size",
        number="0.85B of 17.5B equals 6.1B dense, 7x compute",
        source="Tian et al., arXiv 2507.17702",
        grade="A",
        effect="supports",
    ),
    Evidence(
        claim="factual accuracy of public models follows their total size more than anything else",
        number="closest correlate",
        source="Artificial Analysis, AA-Omniscience",
        grade="B",
        effect="supports",
    ),
    Evidence(
        claim="reasoning saturates and can fall as sparsity grows",
        number="neither reinforcement learning nor test-time compute rescues it",
        source="Nakamura et al., Optimal Sparsity, arXiv 2508.18672",
        grade="A",
        effect="contradicts",
    ),
    Evidence(
        claim="for one user experts may lie in system memory",
        number="gpt-oss-120b: 25.6 tokens/s with 8 GB of VRAM",
        source="community measurements",
        grade="B",
        effect="refines",
    ),
    Evidence(
        claim="the gain shrinks as soon as a second user comes, since they touch other experts",
        number="57.3 to 60.4 tokens/s in all from one to two users, GB10",
        source="measured on GB10",
        grade="A",
        effect="refines",
    ),
    Evidence(
        claim="training reaches half of what dense models reach of the hardware",
        number="MFU 0.13 to 0.22 against 0.40 to 0.46",
        source="Megatron-Bridge measurements",
        grade="A",
        effect="refines",
    ),
    Evidence(
        claim="nobody has measured the number of subjects itself as a trigger",
        number="none",
        source="absence of evidence",
        grade="B",
        effect="refines",
    ),
)


QUESTIONS = {
    "narrow": "questions on one subject",
    "moderate": "questions on a few subjects",
    "broad": "questions on many subjects",
    "encyclopedic": "questions on everything",
}


def mode_factor(reading: Reading) -> float:
    """What training leaves of the advantage: adapters and routers fit badly, and MFU halves."""
    if reading.workload.mode == "finetuning":
        return 0.35 if reading.hardware.count == 1 else 0.6
    return 0.85 if reading.workload.mode == "training" else 1.0


def expert_core(reading: Reading) -> float:
    """How much experts bring here, before the length of the context is considered. Hybrids may have experts too."""
    return (
        reading.room
        * reading.want_of_experts
        * (1.0 - 0.3 * reading.accuracy)
        * mode_factor(reading)
        * (1.0 - reading.signal)
    )


def patience(reading: Reading) -> float:
    """What a tall load leaves: its cache is whole, which shared prefixes soften, and it cannot follow a stream."""
    return (1.0 - 0.4 * reading.tall * (1.0 - 0.5 * reading.reuse)) * (1.0 - 0.6 * reading.endless)


def strength(reading: Reading) -> float:
    """room · want · patience · (1 - 0.3 · accuracy) · mode · (1 - signal)"""
    return bounded(expert_core(reading) * patience(reading))


def explain(reading: Reading) -> Finding:
    """The rule's finding, with its arithmetic."""
    work, machine = reading.workload, reading.hardware
    return Finding(
        rule="bottomless-knowledge",
        family="moe",
        strength=strength(reading),
        reason=_reason(reading),
        formula="room · want · patience · (1 - 0.3 · accuracy) · mode · (1 - signal)",
        terms=(
            Term(
                name="room",
                input=f"{say_bytes(reading.memory_for_experts)} on {machine.label}"
                + (", system memory included" if reading.experts_may_wait else ""),
                function="half at 12 GB",
                value=reading.room,
                source="every expert must be resident",
            ),
            Term(
                name="want",
                input=f"{work.breadth} breadth, knowledge in {work.knowledge}, memory {reading.memory_over_speed:.2g} times "
                "what can be read per token",
                function="closed book + (1 - closed book) · 0.6 · poor",
                value=reading.want_of_experts,
                source="arXiv 2410.19034; GB10 measurements",
            ),
            Term(
                name="patience",
                input=f"tall {reading.tall:.2f}, prefix reuse {work.prefix_reuse}, endless {reading.endless:.2f}",
                function="(1 - 0.4 · tall · (1 - 0.5 · reuse)) · (1 - 0.6 · endless)",
                value=patience(reading),
                source="its attention keeps the whole cache",
            ),
            Term(
                name="mode",
                input=f"{work.mode} on {machine.label}, accuracy {work.accuracy}",
                function="finetuning 0.35 (one card) or 0.6, training 0.85; 1 - 0.3 · accuracy",
                value=mode_factor(reading) * (1.0 - 0.3 * reading.accuracy),
                source="arXiv 2508.18672; Megatron-Bridge",
            ),
        ),
        evidence=EVIDENCE,
    )


def _reason(reading: Reading) -> str:
    work, memory = reading.workload, say_bytes(reading.hardware.total_memory_bytes)
    asked = QUESTIONS[work.breadth]
    if reading.signal > 0.5:
        return f"there is no encyclopaedia in {work.modality}; experts would only take memory"
    if reading.room < 0.5 and reading.closed_book > 0.4:
        return f"{asked} gain from many experts, but {memory} hold too few of them; retrieval is cheaper"
    if reading.experts_may_wait and reading.closed_book > 0.4:
        held = say_bytes(work.ram or 0)
        return f"{asked} gain from many experts, and for so few users those may lie in {held} of system memory"
    if reading.poor > 0.5 and reading.closed_book < 0.5:
        return (
            f"much memory ({memory}) and little bandwidth: a dense model that fills it is "
            f"{reading.memory_over_speed:.0f} times too slow, experts are not"
        )
    if reading.closed_book > 0.4:
        return f"{asked} gain from many experts: facts follow all parameters, speed the active ones"
    if work.knowledge == "documents":
        return f"documents supply the facts, so {asked} ask less of the weights; experts would bring speed"
    return f"{asked} gain little from experts: a dense model knows enough and reasons better for its memory"


BOTTOMLESS_KNOWLEDGE = Rule("bottomless-knowledge", "moe", strength, explain)
