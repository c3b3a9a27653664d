"""Block sizes of the delta rule's kernels: the key dimension whole in registers, the value dimension in tiles.

Rows for inputs of two bytes come first; float32 products (three TF32 products each) need more warps to stay in registers.
"""

from archcompass.kernels.tiles import Row, Table, Tile

WIDEST_KEY = 256
CHUNK_SIZES = (16, 32, 64)
# A float32 product is three TF32 products, and in chunks of 64 its backward pass does not stay in registers.
WIDEST_FLOAT32_CHUNK = 32

HALF = {"element_bytes": 2}

STATE = Table(
    "delta_rule.state",
    (
        Row(Tile({"BLOCK_V": 32}, warps=4, stages=2), upto=HALF | {"key_dim": 64}, capabilities=(80, 90)),
        Row(Tile({"BLOCK_V": 32}, warps=4, stages=1), upto=HALF | {"key_dim": 128}),
        Row(Tile({"BLOCK_V": 16}, warps=4, stages=1), upto={"key_dim": 128}, capabilities=(90, 90)),
        Row(Tile({"BLOCK_V": 16}, warps=8, stages=1)),
    ),
)
STATE_BACKWARD = Table(
    "delta_rule.state_backward",
    (
        Row(Tile({"BLOCK_V": 32}, warps=4, stages=1), upto=HALF | {"key_dim": 128}),
        Row(Tile({"BLOCK_V": 16}, warps=4, stages=1), upto={"key_dim": 128}, capabilities=(90, 90)),
        Row(Tile({"BLOCK_V": 16}, warps=8, stages=1)),
    ),
)
SCORES = Table(
    "delta_rule.scores",
    (Row(Tile({"BLOCK_K": 64}, warps=4, stages=1), upto=HALF), Row(Tile({"BLOCK_K": 16}, warps=8, stages=1))),
)
VECTOR_SCORES = Table("delta_rule.vector_scores", (Row(Tile({"BLOCK_K": 16}, warps=4, stages=1)),))
WRITES = Table(
    "delta_rule.writes",
    (Row(Tile({"BLOCK": 64}, warps=4, stages=1), upto=HALF), Row(Tile({"BLOCK": 32}, warps=8, stages=1))),
)
OUTPUT = Table(
    "delta_rule.output",
    (
        Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=1), upto=HALF),
        Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=8, stages=1)),
    ),
)
OUTPUT_GRADIENT = Table(
    "delta_rule.output_gradient",
    (
        Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=1), upto=HALF),
        Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=8, stages=1)),
    ),
)
TARGET_GRADIENT = Table(
    "delta_rule.target_gradient",
    (Row(Tile({"BLOCK_V": 64}, warps=4, stages=1), upto=HALF), Row(Tile({"BLOCK_V": 32}, warps=8, stages=1))),
)
PAIRS_GRADIENT = Table(
    "delta_rule.pairs_gradient",
    (Row(Tile({"BLOCK_V": 32}, warps=4, stages=1), upto=HALF), Row(Tile({"BLOCK_V": 16}, warps=8, stages=1))),
)
# `kinds` of scores: 2, or 4 of DPLR. `vector` is 1 under a decay per key dimension.
ROWS_GRADIENT = Table(
    "delta_rule.rows_gradient",
    (
        Row(Tile({"BLOCK_K": 32, "BLOCK_V": 64}, warps=4, stages=1), upto=HALF | {"kinds": 2, "vector": 0}),
        Row(Tile({"BLOCK_K": 16, "BLOCK_V": 32}, warps=8, stages=1), upto={"kinds": 2}),
        Row(Tile({"BLOCK_K": 16, "BLOCK_V": 32}, warps=8, stages=1), upto=HALF),
        Row(Tile({"BLOCK_K": 16, "BLOCK_V": 16}, warps=8, stages=1)),
    ),
)
RUNNING = Table("delta_rule.running", (Row(Tile({"BLOCK_K": 32}, warps=4, stages=1)),))
STEP = Table(
    "delta_rule.step",
    (
        Row(Tile({"BLOCK_V": 32}, warps=4, stages=1), upto={"key_dim": 128}),
        Row(Tile({"BLOCK_V": 16}, warps=4, stages=1)),
    ),
)
