"""Vectors and scores of whole texts."""
