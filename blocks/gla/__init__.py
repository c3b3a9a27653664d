"""Gated linear attention: one learned decay per key channel and token."""
