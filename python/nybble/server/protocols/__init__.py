"""Wire protocols: each translates its requests to one internal request, and events back to its responses."""
