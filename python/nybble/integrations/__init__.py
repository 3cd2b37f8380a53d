"""nybble in other frameworks."""
