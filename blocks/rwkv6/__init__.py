"""RWKV-6 (Finch): linear attention with a decay per channel that the input chooses."""
