"""How experts run on a processor when no gradient is kept, and which rows that keeps in memory. Torch-free."""

LARGE_ELEMENTS = 1 << 23
"""Rows of all experts together that leave every cache: they are then gathered, used and dropped expert by expert."""


def one_by_one(pairs: int, hidden: int, element_bytes: int) -> bool:
    """Whether each expert is finished before the next: in float32, whose products gain nothing by being grouped, or large.

    Args:
        pairs: tokens times the experts each of them chose.
        hidden: width of a row.
    """
    return element_bytes == 4 or pairs * hidden > LARGE_ELEMENTS
