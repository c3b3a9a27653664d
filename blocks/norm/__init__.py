"""Normalisation over the width."""
