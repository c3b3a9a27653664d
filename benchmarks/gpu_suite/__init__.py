"""What `gpu.py` is made of: cases by operation, the clock, the measurement of one case, and who watches over them."""
