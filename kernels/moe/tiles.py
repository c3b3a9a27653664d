"""Block sizes of the grouped matrix products, by the rows an expert gets on average and the element size."""

from archcompass.kernels.tiles import Row, Table, Tile


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps=warps, stages=stages)


def _rows(upto: int) -> dict[str, int]:
    return {"rows_per_expert": upto, "element": 2}


LARGE = 2**40

# Rows of a tile belong to one expert. With a gate a tile holds two accumulators.
ROWS = Table(
    "moe.rows",
    (
        Row(_tile(16, 64, 128, 4, 3), upto=_rows(16), shared_kib=99),
        Row(_tile(32, 64, 64, 4, 3), upto=_rows(64), shared_kib=99),
        Row(_tile(128, 64, 64, 8, 3), upto=_rows(LARGE), shared_kib=99),
        Row(_tile(32, 32, 32, 4, 2)),
    ),
)

WEIGHTS = Table(
    "moe.weights",
    (
        Row(_tile(64, 64, 128, 8, 2), upto=_rows(LARGE), shared_kib=72),
        Row(_tile(32, 32, 32, 4, 2)),
    ),
)
