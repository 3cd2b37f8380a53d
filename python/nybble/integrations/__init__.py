"""Integrations of nybble into other frameworks."""
