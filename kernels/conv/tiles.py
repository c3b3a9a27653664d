"""Block sizes of the causal convolution kernels: a tile of time by channels."""

from archcompass.kernels.tiles import Row, Table, Tile

FORWARD = Table("causal_conv.forward", (Row(Tile({"BLOCK_T": 32, "BLOCK_C": 64}, warps=4)),))
BACKWARD = Table("causal_conv.backward", (Row(Tile({"BLOCK_T": 32, "BLOCK_C": 64}, warps=4)),))

TILES_PER_PROGRAM = 8  # of time, whose sums for the weight's gradient one program keeps in registers
