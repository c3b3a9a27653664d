"""A model: a block made of blocks."""
