"""Gated and plain multilayer perceptrons."""
