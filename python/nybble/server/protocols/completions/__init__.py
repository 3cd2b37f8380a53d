"""`/v1/completions`: prompts as text or tokens in, text out."""
