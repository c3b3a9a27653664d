"""Which family comes first: rules propose, vetoes and feasibility dispose. Cheap enough to be asked a hundred times.

Families that hold their smallest useful model and are not vetoed come before those that do not; within each group the rules'
strengths decide, ties keep the order of the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from archcompass.advisor.reading import Reading
from archcompass.advisor.rules import RULES, Finding, findings
from archcompass.advisor.sizing.ask import Ask
from archcompass.advisor.sizing.search import Sized, fits_at_all, least, size, useful
from archcompass.advisor.sizing.shapes import FAMILIES, Family, Style, build_spec
from archcompass.advisor.sizing.styles import styles
from archcompass.advisor.workload import Workload
from archcompass.blocks.model.spec import ModelSpec, block_names

NO_RECURRENT_KERNELS = frozenset({"Google", "AWS", "Huawei"})
"""Vendors for whose accelerators neither Triton nor the engines in use bring kernels of recurrences."""


class Veto(NamedTuple):
    """Why a family is not to be trusted with this workload, however well it fits."""

    family: Family
    name: str
    reason: str

    @property
    def reason_first(self) -> str:
        """The sentence for when this family comes first all the same, because nothing else fits."""
        return f"Only the {self.family} fits, and it is not to be trusted here ({self.name}): {self.reason}."


@dataclass(frozen=True)
class Decision:
    """A workload, judged.

    Attributes:
        ask: what a size must satisfy; holds the reading.
    """

    ask: Ask

    @classmethod
    def of(cls, workload: Workload) -> Decision:
        """The decision for a workload on the machine it names.

        Raises:
            InputError: the machine is not known, or cannot be.
        """
        return cls(Ask(Reading.of(workload)))

    @property
    def reading(self) -> Reading:
        """What the rules read."""
        return self.ask.reading

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the four rules say, strongest first."""
        return findings(self.reading)

    @cached_property
    def strength(self) -> dict[Family, float]:
        """Strength of each family's rule."""
        return {rule.family: rule.strength(self.reading) for rule in RULES}

    @cached_property
    def styles(self) -> dict[Family, Style]:
        """What the workload decides of each family's shape."""
        return styles(self.reading)

    @cached_property
    def vetoes(self) -> tuple[Veto, ...]:
        """Families that must not come first, and why."""
        return tuple(veto for family in FAMILIES for veto in [*self.distrust[family], *self._memory_of(family)])

    @cached_property
    def distrust(self) -> dict[Family, list[Veto]]:
        """Vetoes that have nothing to do with memory."""
        return {family: self._distrust_of(family) for family in FAMILIES}

    @cached_property
    def fits(self) -> dict[Family, bool]:
        """Whether each family's smallest useful model fits."""
        return {family: fits_at_all(self.styles[family], self.ask) for family in FAMILIES}

    @cached_property
    def wished(self) -> tuple[Family, ...]:
        """All four families in the order they would have, did all of them fit."""

        def key(family: Family) -> tuple[bool, float, int]:
            return (bool(self.distrust[family]), -self.strength[family], FAMILIES.index(family))

        return tuple(sorted(FAMILIES, key=key))

    @property
    def order(self) -> tuple[Family, ...]:
        """All four families, best first: those that fit, then those that do not."""
        return tuple(sorted(self.wished, key=lambda family: not self.fits[family]))

    @cached_property
    def family(self) -> Family | None:
        """The family that comes first; None when none fits. Asks of memory only as long as it must."""
        return next((family for family in self.wished if fits_at_all(self.styles[family], self.ask)), None)

    def sized(self, family: Family) -> Sized:
        """A family's size. One that comes first only because a better one does not fit stands in for that, and is no larger
        than the least of it: with more memory the better one takes its place, and more memory must not make the answer smaller.
        """
        better = self.wished[: self.wished.index(family)] if family == self.family else ()
        most = min((least(self.styles[each], self.ask) for each in better), default=inf)
        return size(self.styles[family], self.ask, most)

    def least_spec(self, family: Family) -> ModelSpec:
        """The smallest useful model of a family: what its traits are read from."""
        style = self.styles[family]
        return build_spec(style, useful(style, self.ask)[0])

    def _distrust_of(self, family: Family) -> list[Veto]:
        work, found = self.reading.workload, []
        if self.reading.recall < 0.8 and work.ecosystem == "any" and not work.unbounded:
            return []
        traits = self.least_spec(family).traits()
        mixers = [traits[name] for name in block_names(self.least_spec(family), "mixer")]
        if self.reading.recall >= 0.8 and not any(mixer.exact_recall for mixer in mixers):
            reason = f"recall is {work.recall}, and nothing in it can look an earlier token up exactly"
            found.append(Veto(family=family, name="exact recall", reason=reason))
        recurrent = any(mixer.bounded_state and mixer.window is None for mixer in mixers)
        if work.unbounded and not recurrent:
            reason = "the input never ends: a full cache outgrows any memory, and a window forgets what is older"
            found.append(Veto(family=family, name="endless input", reason=reason))
        if recurrent and work.ecosystem == "mature" and self.reading.hardware.vendor in NO_RECURRENT_KERNELS:
            reason = f"no mature engine has kernels for its recurrence on {self.reading.hardware.name}"
            found.append(Veto(family=family, name="no kernel", reason=reason))
        return found

    def _memory_of(self, family: Family) -> list[Veto]:
        if self.fits[family]:
            return []
        return [
            Veto(family=family, name="memory", reason=f"its smallest useful model does not fit {self.ask.memory_said}")
        ]


def trusted_family(workload: Workload) -> Family | None:
    """The family that comes first for a workload; None when none fits that no veto speaks against."""
    decision = Decision.of(workload)
    return decision.family if decision.family and not decision.distrust[decision.family] else None


def family_of(workload: Workload) -> Family | None:
    """The family that comes first for a workload; None when none fits."""
    return Decision.of(workload).family
