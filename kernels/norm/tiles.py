"""Block sizes of the RMS norm kernels: whole groups in registers, several short rows side by side."""

from archcompass.kernels.tiles import Row, Table, Tile

WIDEST_GROUP = 32768

FORWARD = Table(
    "rms_norm.forward",
    (
        Row(Tile({"ROWS": 16}, warps=4), upto={"size": 128}),
        Row(Tile({"ROWS": 4}, warps=4), upto={"size": 512}),
        Row(Tile({"ROWS": 1}, warps=4), upto={"size": 2048}),
        Row(Tile({"ROWS": 1}, warps=8), upto={"size": 8192}),
        Row(Tile({"ROWS": 1}, warps=16), upto={"size": 16384}),
        Row(Tile({"ROWS": 1}, warps=32)),
    ),
)
BACKWARD = Table(
    "rms_norm.backward",
    (
        Row(Tile({"ROWS": 8}, warps=4), upto={"size": 128}),
        Row(Tile({"ROWS": 4}, warps=4), upto={"size": 512}),
        Row(Tile({"ROWS": 1}, warps=4), upto={"size": 2048}),
        Row(Tile({"ROWS": 1}, warps=16), upto={"size": 8192}),
        Row(Tile({"ROWS": 1}, warps=32)),
    ),
)

MOST_PARTIAL_SUMS = 264  # two for each multiprocessor of an H100
