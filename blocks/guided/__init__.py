"""A mixer guided by a transformer block that several places share (Zamba2)."""
