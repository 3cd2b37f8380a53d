"""Routes that change what the server serves. They are off by default."""
