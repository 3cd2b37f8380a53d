"""What goes wrong, in the shape in which OpenAI's clients expect it: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from nybble.errors import ContextFullError, QueueFullError

_LONGEST = 1000
"""Characters of a message. What a client sent may be quoted in it, and that may be long."""


_PARAMS = {name: name for name in ("logit_bias", "stop", "regex", "grammar")} | {"schema": "response_format"}
"""The parameters that options which errors begin with come from."""


_BRANCH = re.compile(r"str|int|[A-Z]\w+|.*[-\[].*")
"""What pydantic calls the alternatives of a union; clients know only the parameters."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An error that the client is told of."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        """The error as it is sent. Clients may have sent halves of surrogate pairs, which no answer can hold."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        text = _sendable(str(self))
        return ErrorBody(
            error=ErrorDetail(
                message=text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...",
                type=kind,
                param=None if self.param is None else _sendable(self.param)[:100],
                code=self.code,
            )
        )

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body.model_dump_json(), self.status, headers=self.headers, media_type="application/json")


def overloaded(message: str, status: int, code: str) -> ApiError:
    """An error that goes away by itself; clients are asked to come back in a second."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})


@contextlib.contextmanager
def told_to_the_client(param: str) -> Iterator[None]:
    """Turns what the engine says about an argument into an error that names the parameter of the request."""
    try:
        yield
    except QueueFullError as error:
        raise overloaded(str(error), 429, "queue_full") from error
    except ContextFullError as error:
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error
    except RecursionError as error:
        raise ApiError(400, "something in the request is nested too deeply") from error
    except MemoryError as error:
        raise overloaded("there is no memory for this at the moment", 503, "out_of_memory") from error
    except ValueError as error:
        name = str(error).partition(":")[0]
        raise ApiError(400, str(error), param=_PARAMS.get(name, param)) from error


def add_handlers(app: FastAPI) -> None:
    """Gives every error of the application OpenAI's shape."""

    async def told(request: Request, error: Exception) -> Response:
        match error:
            case ApiError():
                return error.response()
            case RequestValidationError() if "json" not in request.headers.get("content-type", "json"):
                return ApiError(415, "the body must be JSON, and say so: Content-Type: application/json").response()
            case RequestValidationError():
                return _invalid(error.errors()).response()
            case HTTPException():
                return ApiError(error.status_code, str(error.detail), headers=error.headers).response()
        # The traceback goes to the log, not to the client.
        return ApiError(500, "the server failed: its log tells why").response()

    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, told)


def _invalid(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that a request has wrong. Of the alternatives of a union, the one that was got furthest into."""
    first = max(found, key=lambda error: len(error["loc"])) if _in_union(found) else found[0]
    kind, (*way, last) = first["type"], [str(part) for part in first["loc"] if part != "body"] or [""]
    if kind == "extra_forbidden" or not _BRANCH.fullmatch(last):
        way.append(last)
    param = ".".join(part for part in way if part == last or not _BRANCH.fullmatch(part)) or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    if kind == "extra_forbidden":
        return ApiError(400, f"unsupported parameter: {param}", param=param, code="unsupported_parameter")
    if kind == "missing" and param is None:
        return ApiError(400, "the body is missing, expected JSON", code="missing_required_parameter")
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    return ApiError(400, f"{param or 'body'}: {first['msg']}", param=param, code=code)


def _in_union(found: Sequence[Mapping[str, Any]]) -> bool:
    return len(found) > 1 and len({error["loc"][:2] for error in found}) == 1


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 503)
}
"""The errors that any route may answer with, for the OpenAPI description."""
