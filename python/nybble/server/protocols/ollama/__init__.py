"""Ollama's API: its requests become those of the other protocols, and their answers become lines of JSON."""
