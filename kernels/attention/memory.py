"""What a whole prompt's attention keeps in memory on a processor beside its inputs and result (`prompt.py`). Torch-free."""

ROWS = 512
"""Queries times the heads of a group at once: few enough that little is computed above the diagonal."""

SCORES = 1 << 23
"""Elements of scores at once: long prompts take fewer rows."""

SHORTEST, LONGEST = 384, 1 << 15
"""Tokens of a prompt served there; a shorter one is not worth the calls."""


def queries_at_once(tokens: int, group: int) -> int:
    """Positions whose queries are worked on together, `group` heads of each."""
    return max(1, min(ROWS, SCORES // tokens) // group)


def prompt_bytes(*, tokens: int, group: int, key_dim: int, value_dim: int) -> float:
    """Bytes of one key-value head in float32, its mask, and the scores of some queries with these and their result.

    Args:
        tokens: of the prompt, causal and whole; 0 bytes where another form serves it.
        group: query heads of a key-value head.
    """
    if not SHORTEST <= tokens <= LONGEST:
        return 0.0
    some = min(tokens, queries_at_once(tokens, group))
    return 4.0 * (tokens * (key_dim + value_dim) + some * some + group * some * (key_dim + tokens + value_dim))
