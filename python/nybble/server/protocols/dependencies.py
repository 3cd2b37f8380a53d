"""What routes have in common: the models of their application, keys and streams in the OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from nybble.server.pool.pool import Pool

# The middleware checks keys. This only describes them.
KEY = Depends(HTTPBearer(auto_error=False, description="The API key of the server."))
"""The key that a route needs."""

STREAM: dict[str, Any] = {"text/event-stream": {}}
"""A stream of events, without a schema, which some readers apply to the stream and others to each event."""


# FastAPI calls functions that are not `async` in another thread.
async def _pool(request: Request) -> Pool:
    pool: Pool = request.app.state.pool
    return pool


Served = Annotated[Pool, Depends(_pool)]
"""The models of the application that a request came to. Applications share their routes, which take long to build."""
