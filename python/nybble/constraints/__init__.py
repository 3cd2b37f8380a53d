"""Constraints on completions: rewrites JSON Schemas for the grammar, and creates the native constraints."""
