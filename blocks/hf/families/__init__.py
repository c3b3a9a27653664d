"""One file per Hugging Face `model_type`, each with its `FAMILY`."""
