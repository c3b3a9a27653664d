"""Multi-head latent attention, with DeepSeek's lightning indexer as an option."""
