"""The recurrent block of Griffin: a gated linear recurrence, one number of state per channel."""
