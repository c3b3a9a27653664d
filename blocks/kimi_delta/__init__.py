"""Kimi Delta Attention: the delta rule with one learned decay per key channel."""
