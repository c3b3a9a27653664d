"""What blocks share in refusing what cannot be."""

import pytest

from archcompass.blocks.base import must_divide
from archcompass.errors import SpecError


@pytest.mark.parametrize(
    ("value", "size", "best"), [(3, 4, 2), (7, 64, 8), (9, 6, 6), (5, 7, 7), (700, 10**15, 640), (2, 1, 1)]
)
def test_a_value_that_does_not_divide_is_refused_with_the_nearest_that_does(value: int, size: int, best: int) -> None:
    with pytest.raises(SpecError, match=rf"^groups \({value}\) must divide heads \({size}\); nearest: {best}$"):
        must_divide("groups", value, "heads", size)


def test_only_divisors_are_let_through() -> None:
    def refused(value: int) -> bool:
        try:
            must_divide("groups", value, "heads", 12)
        except SpecError:
            return True
        return False

    assert [value for value in range(1, 14) if not refused(value)] == [1, 2, 3, 4, 6, 12]
