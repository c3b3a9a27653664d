"""RWKV-4: a weighted mean of the past with one decay per channel."""
