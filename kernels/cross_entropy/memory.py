"""How many tokens the loss takes at a time. Torch-free."""

CHUNK_BYTES = 64 * 2**20


def chunk_tokens(vocab: int) -> int:
    """Tokens per chunk: float32 logits of about CHUNK_BYTES, and at least 16 tokens."""
    return max(16, CHUNK_BYTES // (4 * max(1, vocab)))
