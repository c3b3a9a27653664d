"""Attention over a few blocks of keys, chosen by content, by position, or both."""
