"""Mamba-1: a selective state space layer, one decay per channel and state entry."""
