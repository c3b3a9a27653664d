"""Token embedding and output head."""
