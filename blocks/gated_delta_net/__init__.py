"""Gated DeltaNet: the delta rule with one learned decay per head."""
