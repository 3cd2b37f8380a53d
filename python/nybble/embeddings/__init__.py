"""Vectors and scores of whole documents."""
