"""Block sizes of the fused head and loss: a tile of logits (tokens by words) is a matrix product over the width."""

from archcompass.kernels.tiles import Row, Table, Tile


def _tile(tokens: int, words: int, depth: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_T": tokens, "BLOCK_V": words, "BLOCK_D": depth}, warps=warps, stages=stages)


LOGITS = Table(
    "cross_entropy.logits",
    (
        Row(_tile(128, 128, 64, 8, 3), upto={"element": 2, "capped": 0}, shared_kib=100, capabilities=(90, 90)),
        Row(_tile(128, 64, 64, 8, 3), upto={"element": 2}, shared_kib=74),
        Row(_tile(32, 64, 32, 8, 2)),
    ),
)
