"""The four rules. Each reads a workload on a machine and speaks for one family."""

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules.base import Evidence, Finding, Rule, Term
from archcompass.advisor.rules.bottomless_knowledge import bottomless_knowledge
from archcompass.advisor.rules.hybrids import hybrids
from archcompass.advisor.rules.infinite_memory import infinite_memory
from archcompass.advisor.rules.maximum_quality import maximum_quality

RULES: tuple[Rule, ...] = (maximum_quality, bottomless_knowledge, infinite_memory, hybrids)


def findings(reading: Reading) -> tuple[Finding, ...]:
    """What all four rules say, strongest first; ties keep the rules' order."""
    return tuple(sorted((rule(reading) for rule in RULES), key=lambda finding: -finding.strength))


__all__ = ["RULES", "Evidence", "Finding", "Rule", "Term", "findings"]
