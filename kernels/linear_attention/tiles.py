"""Block sizes of the linear attention kernels. What each needs is kept in benchmarks/results/kernels_aot_triton_*.json."""

from archcompass.kernels.tiles import Row, Table, Tile

CHUNK = {"none": 64, "constant": 64, "scalar": 64, "vector": 32}  # tokens per chunk


def _table(kernel: str, *rows: Row) -> Table:
    return Table(f"linear_attention.{kernel}", rows)


# `bytes` is the size of an element: float32 products take three tensor core products, and as many registers. `levels`
# is how often a vector decay halves the chunk, 0 with any other decay.
STATE = _table(
    "state",
    Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=2), upto={"bytes": 2}),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=4, stages=1)),
)
OUTPUT = _table(
    "output",
    Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=2), upto={"bytes": 2}),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=8, stages=1)),
)
SCORES = _table(
    "scores",
    Row(Tile({"BLOCK_K": 64}, warps=4, stages=1), upto={"bytes": 2}),
    Row(Tile({"BLOCK_K": 32}, warps=4, stages=1)),
)
STATE_GRADIENT = _table(
    "state_gradient",
    Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=2), upto={"bytes": 2}),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=4, stages=1)),
)
QUERY_KEY_GRADIENT = _table(
    "query_key_gradient",
    Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4), upto={"bytes": 2, "levels": 0}, capabilities=(90, 109)),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=4), upto={"bytes": 2, "levels": 0}),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=4), upto={"bytes": 2}),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=8)),
)
VALUE_GRADIENT = _table(
    "value_gradient",
    Row(Tile({"BLOCK_K": 64, "BLOCK_V": 64}, warps=4, stages=1), upto={"bytes": 2}),
    Row(Tile({"BLOCK_K": 32, "BLOCK_V": 32}, warps=8, stages=1)),
)
STEP = _table(
    "step",
    Row(Tile({"BLOCK_V": 32}, warps=4), upto={"key_dim": 128}),
    Row(Tile({"BLOCK_V": 16}, warps=4), upto={"key_dim": 256}),
    Row(Tile({"BLOCK_V": 8}, warps=8)),
)
RUNNING = _table("running", Row(Tile({"BLOCK": 32}, warps=4)))
