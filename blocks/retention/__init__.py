"""Retention (RetNet): linear attention with a fixed decay per head and turned queries and keys."""
