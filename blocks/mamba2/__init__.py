"""Mamba-2: a state space layer with one decay per head."""
