"""How long the work of a model takes on a machine, and how much memory it holds.

Torch-free except for `measure/`, which runs the real blocks.
"""
