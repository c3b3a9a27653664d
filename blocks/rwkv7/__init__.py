"""RWKV-7 (Goose): a delta rule whose decay, learning rate and key are vectors."""
