"""Block sizes of the attention kernels, by bytes of one row of a tile (head width, rounded up, times element size).

float32 takes three tensor core products for one, and registers for their parts: it has rows of its own.
"""

from archcompass.kernels.tiles import Row, Table, Tile

AMPERE_AND_ADA = (80, 89)
HOPPER_ON = (90, 110)  # Hopper and data centre Blackwell: wgmma and tcgen05 keep operands out of registers


def _tile(m: int, n: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_M": m, "BLOCK_N": n}, warps=warps, stages=stages)


def _half(row_bytes: int) -> dict[str, int]:
    return {"row_bytes": row_bytes, "element": 2}


FORWARD = Table(
    "attention.forward",
    (
        Row(_tile(128, 64, 4, 3), upto=_half(128), shared_kib=72, capabilities=HOPPER_ON),
        Row(_tile(128, 64, 8, 3), upto=_half(256), shared_kib=144, capabilities=HOPPER_ON),
        Row(_tile(128, 64, 8, 2), upto=_half(128), shared_kib=72),
        Row(_tile(64, 64, 4, 2), upto=_half(256), shared_kib=90, capabilities=AMPERE_AND_ADA),
        Row(_tile(64, 64, 8, 2), upto=_half(256), shared_kib=90),
        Row(_tile(64, 32, 8, 2), upto=_half(512), shared_kib=99),
        Row(_tile(64, 32, 4, 1), upto=_half(256)),
        Row(_tile(32, 32, 4, 1), upto={"row_bytes": 256}, shared_kib=72),
        Row(_tile(16, 16, 4, 1)),
    ),
)

BACKWARD_KEYS = Table(
    "attention.backward.keys",
    (
        Row(_tile(32, 64, 8, 2), upto=_half(256), shared_kib=90),
        Row(_tile(32, 32, 8, 1), upto=_half(512), shared_kib=99),
        Row(_tile(32, 32, 4, 1), upto=_half(256)),
        Row(_tile(16, 16, 4, 1)),
    ),
)

BACKWARD_QUERIES = Table(
    "attention.backward.queries",
    (
        Row(_tile(64, 64, 8, 2), upto=_half(128), shared_kib=72),
        Row(_tile(64, 64, 8, 2), upto=_half(256), shared_kib=144, capabilities=HOPPER_ON),
        Row(_tile(64, 32, 8, 1), upto=_half(256), shared_kib=90),
        Row(_tile(32, 32, 8, 1), upto=_half(512), shared_kib=99),
        Row(_tile(32, 32, 4, 1), upto=_half(256)),
        Row(_tile(16, 16, 4, 1)),
    ),
)

# Rows of a split are (query, head of the group) pairs, at least 16 of them.
SPLIT = Table(
    "attention.split",
    (
        Row(Tile({"BLOCK_N": 64}, warps=4, stages=3), upto={"row_bytes": 128, "rows": 64}),
        Row(Tile({"BLOCK_N": 32}, warps=4, stages=3), upto={"row_bytes": 256, "rows": 64}, shared_kib=90),
        Row(Tile({"BLOCK_N": 32}, warps=4, stages=2), upto={"row_bytes": 512, "rows": 64}, shared_kib=99),
        Row(Tile({"BLOCK_N": 16}, warps=4, stages=1)),
    ),
)

LATENT = Table(
    "attention.latent",
    (
        Row(Tile({"BLOCK_R": 32, "BLOCK_N": 32}, warps=8, stages=2), upto={"row_bytes": 1024}, shared_kib=160),
        Row(Tile({"BLOCK_R": 16, "BLOCK_N": 16}, warps=4, stages=1)),
    ),
)

# Rows as wide as a latent (512 in the models there are), of queries, of their gradients, of latents and of a float32 sum.
LATENT_BACKWARD = Table(
    "attention.latent.backward",
    (
        Row(Tile({"BLOCK_R": 32, "BLOCK_N": 16}, warps=8, stages=1), shared_kib=120),
        Row(Tile({"BLOCK_R": 16, "BLOCK_N": 16}, warps=8, stages=1)),
    ),
)

# BLOCK_R rows are (query, head) pairs that chose a block.
SPARSE_BACKWARD = Table(
    "attention.sparse.backward",
    (
        Row(Tile({"BLOCK_R": 32, "BLOCK_N": 64}, warps=8, stages=2), upto=_half(256), shared_kib=90),
        Row(Tile({"BLOCK_R": 32, "BLOCK_N": 32}, warps=8, stages=1), upto=_half(512), shared_kib=99),
        Row(Tile({"BLOCK_R": 32, "BLOCK_N": 32}, warps=4, stages=1), upto=_half(256)),
        Row(Tile({"BLOCK_R": 16, "BLOCK_N": 16}, warps=4, stages=1)),
    ),
)
