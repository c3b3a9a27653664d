"""Block sizes of the selective scan: few channels per program, so that even one sequence fills a GPU."""

from archcompass.kernels.tiles import Row, Table, Tile

WIDEST_STATE = 256
# Tokens between the states that forward keeps and backward starts from again.
KEEP_EVERY = 32
# Programs that keep a large GPU busy: eight for each multiprocessor of an H100. Fewer, and time is cut in segments.
ENOUGH_PROGRAMS = 1056
SHORTEST_SEGMENT = 128

FORWARD = Table(
    "selective_scan.forward",
    (
        Row(Tile({"BLOCK_D": 8}, warps=1, stages=3), upto={"entries": 32}),
        Row(Tile({"BLOCK_D": 4}, warps=1, stages=2)),
    ),
)
BACKWARD = Table(
    "selective_scan.backward",
    (
        Row(Tile({"BLOCK_D": 16}, warps=1, stages=1), upto={"entries": 32}),
        Row(Tile({"BLOCK_D": 4}, warps=1, stages=1)),
    ),
)
STEP = Table(
    "selective_scan.step", (Row(Tile({"BLOCK_D": 32}, warps=4), upto={"entries": 64}), Row(Tile({"BLOCK_D": 8})))
)
