"""Block sizes of the diagonal recurrence: few channels per program, so that even one sequence fills a GPU."""

from archcompass.kernels.tiles import Row, Table, Tile

# Programs that keep a large GPU busy: eight for each multiprocessor of an H100. Fewer, and time is cut in segments.
ENOUGH_PROGRAMS = 1056
SHORTEST_SEGMENT = 64

FORWARD = Table("diagonal_scan.forward", (Row(Tile({"BLOCK_D": 64}, warps=2, stages=3)),))
