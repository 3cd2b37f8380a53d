"""Errors of models that cannot be loaded, as clients receive them."""

from __future__ import annotations

from nybble.server.errors import ApiError, overloaded
from nybble.server.pool.job import StoppedError


def load_error(name: str, error: BaseException | None) -> ApiError:
    """The error of requests for a model that could not be loaded: with what failed, and whether to try again."""
    if isinstance(error, StoppedError):
        return overloaded("the server is shutting down", 503, "shutting_down")
    message = f"the model {name!r} could not be loaded: {error}"
    if isinstance(error, MemoryError):
        return overloaded(message, 503, "out_of_memory")
    if isinstance(error, ConnectionError):
        return overloaded(message, 503, "model_not_loaded")
    return ApiError(500, message, code="model_not_loaded", headers={"x-should-retry": "false"})
