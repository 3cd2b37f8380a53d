"""Models of the Hugging Face Hub and of its cache."""
