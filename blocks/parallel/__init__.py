"""Several blocks on one input, their outputs summed."""
