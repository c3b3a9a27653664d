"""Every case there is: each module here has a function `cases`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from gpu_suite.case import Case


def cases() -> list[Case]:
    """All of them; those of a quick run, which are the issue's targets, come first."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return sorted((case for module in modules for case in module.cases()), key=lambda case: not case.quick)
