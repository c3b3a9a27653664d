"""Every exception this package raises on purpose.

    ArchcompassError
    ├── InputError (ValueError)          what the user gave cannot be used; the command line exits with 2
    │   ├── SpecError                    a block or model that cannot exist
    │   ├── UnknownNameError             a card, model or block kind nobody has heard of; names the nearest
    │   ├── FileFormatError              a file that is not what it should be
    │   └── ConversionError              a configuration one side can say and the other cannot
    ├── DoesNotFitError                  a sound request that no memory here can hold; the command line exits with 1
    ├── BackendError (RuntimeError)      the kernel that was asked for cannot run here
    ├── MeasurementError (RuntimeError)  a measurement that could not be taken
    └── StoppedError                     Ctrl-C; says what was kept; the command line exits with 130

Catch `ArchcompassError` to catch them all. Messages name the field, the value and the rule, and the nearest right
value.
"""

from collections.abc import Iterable
from difflib import get_close_matches

FEW = 12
"""Names that are all listed where none is near."""


class ArchcompassError(Exception):
    """Base of everything raised on purpose.

    Attributes:
        exit_code: what the command line ends with.
    """

    exit_code = 1


class InputError(ArchcompassError, ValueError):
    """What the user gave cannot be used."""

    exit_code = 2


class SpecError(InputError):
    """A block or model that cannot exist, such as key-value heads that do not divide the heads."""


class UnknownNameError(InputError):
    """A name nobody has heard of.

    Args:
        what: the kind of thing that was named ("card", "model", "block kind").
        name: the name that was given.
        known: the names that would have been understood.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        all_known = list(known)
        self.name, self.nearest = name, nearest(name, all_known)
        hint = f"; nearest: {', '.join(self.nearest)}" if self.nearest else ""
        if not hint and len(all_known) <= FEW:
            hint = f"; choose {', '.join(all_known)}"
        super().__init__(f"{what} {name!r} is not known{hint}")


class FileFormatError(InputError):
    """A file that is not what it should be: no mapping, no header, binary, too large, or with tags."""


class ConversionError(InputError):
    """A configuration that one side can say and the other cannot; names the field."""


class DoesNotFitError(ArchcompassError):
    """A sound request that no memory here can hold.

    Args:
        message: what was asked and what it would need.
        needs_bytes: the memory that the smallest answer needs.
        has_bytes: the memory there is.
    """

    def __init__(self, message: str, *, needs_bytes: float | None = None, has_bytes: float | None = None) -> None:
        self.needs_bytes, self.has_bytes = needs_bytes, has_bytes
        super().__init__(message)


class BackendError(ArchcompassError, RuntimeError):
    """The kernel that was asked for cannot run here."""


class MeasurementError(ArchcompassError, RuntimeError):
    """A measurement that could not be taken."""


class StoppedError(ArchcompassError):
    """The user stopped it; the message says what was kept."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest in spelling to `name`, best first, at most `count`."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[hit] for hit in get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]
