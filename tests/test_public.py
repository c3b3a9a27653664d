"""The public names: all there, loaded late, documented."""

import subprocess
import sys

import pytest

import archcompass


@pytest.mark.parametrize("name", archcompass.__all__)
def test_every_public_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(archcompass, name)
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="archcompas"):
        archcompass.recomend  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, archcompass; sys.exit(bool({'torch', 'pydantic', 'typer', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
