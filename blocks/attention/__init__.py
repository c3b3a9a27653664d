"""Softmax attention over cached keys and values."""
