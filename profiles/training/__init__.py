"""Short honest training runs of a designed model. Importing this package does not import torch; running it does."""
