"""Readers of one result: the terminal, Markdown, JSON. They compute nothing that the result does not say."""
