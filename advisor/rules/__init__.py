"""The four rules. Each reads a workload on a machine and speaks for one family."""

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules.base import Evidence, Finding, Rule, Term
from archcompass.advisor.rules.bottomless_knowledge import BOTTOMLESS_KNOWLEDGE
from archcompass.advisor.rules.hybrids import HYBRIDS
from archcompass.advisor.rules.infinite_memory import INFINITE_MEMORY
from archcompass.advisor.rules.maximum_quality import MAXIMUM_QUALITY

RULES: tuple[Rule, ...] = (MAXIMUM_QUALITY, BOTTOMLESS_KNOWLEDGE, INFINITE_MEMORY, HYBRIDS)


def findings(reading: Reading) -> tuple[Finding, ...]:
    """What all four rules say, strongest first; ties keep the rules' order."""
    return tuple(sorted((rule.explain(reading) for rule in RULES), key=lambda finding: -finding.strength))


__all__ = ["RULES", "Evidence", "Finding", "Rule", "Term", "findings"]
