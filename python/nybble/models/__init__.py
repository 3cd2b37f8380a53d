"""Model files: local paths, the Hugging Face Hub, the caches of both, and the default model."""
