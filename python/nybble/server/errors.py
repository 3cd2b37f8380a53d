"""Errors in the format that OpenAI's clients expect: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from nybble.constraints.document import SchemaError
from nybble.errors import ContextFullError, EngineError, QueueFullError

INTERNAL_ERROR = "internal server error; see the log of the server"
"""The message of unexpected errors, whose details go to the log only."""

_MAX_MESSAGE = 1000
"""Characters of a message, which may quote what the client sent."""


_PARAMS = {name: name for name in ("logit_bias", "min_tokens", "stop", "stop_token_ids", "regex", "grammar", "suffix")}
"""The parameter of the request for an option that a message begins with."""


_UNION_MEMBER = re.compile(r"str|int|float|bool|[A-Z]\w+|.*[-\[].*")
"""Pydantic's names for the members of a union. Clients know only parameters."""


class ErrorDetail(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An error that the client receives.

    Args:
        status: The HTTP status.
        message: What is wrong.
        param: The parameter that is wrong.
        code: The code by which programs recognize the error.
        headers: More headers of the response.
    """

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
        self.headers: dict[str, str] = dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        """The body of the response. Lone surrogates that a client sent are replaced."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        text = sendable(str(self))
        return ErrorBody(
            error=ErrorDetail(
                message=text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}...",
                type=kind,
                param=None if self.param is None else sendable(self.param)[:100],
                code=self.code,
            )
        )

    def anthropic_body(self) -> str:
        """The body of the response in Anthropic's format."""
        kinds = {404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 503: "overloaded_error"}
        detail = self.body.error
        kind = kinds.get(self.status) or ("api_error" if self.status >= 500 else detail.type)
        return json.dumps({"type": "error", "error": {"type": kind, "message": detail.message}})

    def response(self, path: str = "") -> Response:
        """The response, in the format of the protocol that the path belongs to."""
        if path.startswith("/api/"):
            text = json.dumps({"error": self.body.error.message})
        elif path.startswith("/v1/messages"):
            text = self.anthropic_body()
        else:
            text = self.body.model_dump_json()
        return Response(text, self.status, headers=self.headers, media_type="application/json")


def overloaded(message: str, status: int, code: str) -> ApiError:
    """A temporary error. Clients are asked to try again after a second."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})


def shutting_down() -> ApiError:
    """The error of requests that come after the signal to end."""
    return overloaded("the server is shutting down", 503, "shutting_down")


def unknown_model(model: str, known: Iterable[str]) -> ApiError:
    """The error of a request for a model that the server does not have."""
    names = " and ".join(repr(name) for name in known)
    message = f"the model {model!r} does not exist; this server serves {names}"
    return ApiError(404, message, param="model", code="model_not_found")


def out_of_memory() -> ApiError:
    """The error of a request for which memory is lacking."""
    return overloaded("not enough memory for this request at the moment", 503, "out_of_memory")


def engine_failed() -> ApiError:
    """The error of a request that was lost with others when the engine failed. The engine accepts requests again."""
    return overloaded("the engine failed while it computed this request: try again", 503, "engine_failed")


@contextlib.contextmanager
def as_api_errors(param: str, parameters: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns errors of the engine into API errors that name a parameter of the request.

    Args:
        param: The parameter that errors name, unless their message begins with another option.
        parameters: The parameters that set options under other names.

    Raises:
        ApiError: The block raised an error that concerns the client.
    """
    try:
        yield
    except QueueFullError as error:
        raise overloaded(str(error), 429, "queue_full") from error
    except ContextFullError as error:
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error
    except RecursionError as error:
        raise ApiError(400, "the request is nested too deeply") from error
    except MemoryError as error:
        raise out_of_memory() from error
    except EngineError as error:
        raise engine_failed() from error
    except ValueError as error:
        raise invalid_option(error, param, parameters or {}) from error


def invalid_option(error: ValueError, param: str, parameters: Mapping[str, str]) -> ApiError:
    """The error of an option, under the name of the parameter that set it.

    Args:
        error: The error, whose message begins with the name of the option.
        param: The parameter to name if the message begins with no option.
        parameters: The parameters that set options under other names.
    """
    parameters = {**_PARAMS, **parameters}
    name, colon, rest = str(error).partition(":")
    if isinstance(error, SchemaError) and name not in parameters:
        parameters[name] = name
    if name in parameters:
        # The message says where in the parameter.
        return ApiError(400, f"{parameters[name]}{colon}{rest}", param=parameters[name].partition(".")[0])
    return ApiError(400, str(error), param=param)


def add_handlers(app: FastAPI) -> None:
    """Gives every error of the application OpenAI's format."""

    def api_error(request: Request, error: Exception) -> ApiError:
        match error:
            case ApiError():
                return error
            case RequestValidationError() if _lacks_json(request):
                given = request.headers.get("content-type")
                found = "no Content-Type" if given is None else f"Content-Type: {given}"
                return ApiError(415, f"found {found}, expected JSON, with the header Content-Type: application/json")
            case RequestValidationError():
                return invalid_request(error.errors())
            case HTTPException(status_code=404 | 405):
                return _unknown_route(app, request, error.status_code)
            case HTTPException():
                return ApiError(error.status_code, str(error.detail), headers=error.headers)
        # Starlette logs the traceback.
        return ApiError(500, INTERNAL_ERROR)

    async def respond(request: Request, error: Exception) -> Response:
        return api_error(request, error).response(request.url.path)

    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)


def _lacks_json(request: Request) -> bool:
    """Whether a request has a body that is not declared as JSON."""
    has_body = getattr(request.state, "body_bytes", 1) > 0
    return has_body and "json" not in request.headers.get("content-type", "")


def _unknown_route(app: FastAPI, request: Request, status: int) -> ApiError:
    """The error of a path or a method that does not exist, which names what there is instead."""
    api = [route for route in app.routes if isinstance(route, APIRoute)]
    known = [(route.path, sorted(route.methods or ())) for route in api if route.include_in_schema]
    path = request.url.path
    if status == 405:
        fitting = [route for route in api if route.path_regex.match(path)]
        methods = sorted({method for route in fitting for method in route.methods or ()})
        message = f"{request.method} {path:.200}: this route takes {' and '.join(methods)}"
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": ", ".join(methods)})
    advice = _ADVICE.get(path.removeprefix("/v1").rstrip("/"))
    near = difflib.get_close_matches(path, [route for route, _ in known], 1)
    if advice is None and near:
        advice = near[0]
    routes = ", ".join(f"{'/'.join(methods)} {route}" for route, methods in known) + ", and Ollama's below /api"
    hint = f"; use {advice}" if advice else ""
    message = f"there is no route {request.method} {path:.200} on this server{hint}. Its routes: {routes}"
    return ApiError(404, message, code="unknown_route")


_ADVICE = {
    "/assistants": "/v1/chat/completions",
    "/threads": "/v1/chat/completions",
    "/completion": "/v1/completions",
    "/infill": "/v1/completions with suffix",
    "/generate": "/v1/completions",
    "/embedding": "/v1/embeddings",
    "/docs": "/openapi.json",
}
"""What to use instead of routes of other servers."""


def invalid_request(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first error of a request. For a union it is the error of the member that was probably meant."""
    first = _of_union(found)
    kind, (*path, last) = first["type"], [str(part) for part in first["loc"] if part != "body"] or [""]
    if kind == "extra_forbidden" or not _UNION_MEMBER.fullmatch(last):
        path.append(last)
    param = ".".join(part for part in path if part == last or not _UNION_MEMBER.fullmatch(part)) or None
    if kind == "json_invalid":
        return ApiError(400, f"the request body is not valid JSON: {first['ctx']['error']}")
    if kind == "extra_forbidden":
        return ApiError(400, f"unsupported parameter: {param}", param=param, code="unsupported_parameter")
    if kind == "missing" and param is None:
        return ApiError(400, "the request body is missing, expected JSON", code="missing_required_parameter")
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    if param is None and (named := re.match(r"([a-z_]+)(?:\.\w+)*: ", first["msg"])) is not None:
        return ApiError(400, first["msg"], param=named[1], code=code)
    return ApiError(400, f"{param or 'body'}: {first['msg']}", param=param, code=code)


def _of_union(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The error to report. Of a union, each member that does not fit has errors of its own."""
    first = found[0]
    together = [error for error in found if error["loc"][:2] == first["loc"][:2]]
    shared = next(
        (at for at, keys in enumerate(zip(*(error["loc"] for error in together), strict=False)) if len({*keys}) > 1),
        min(len(error["loc"]) for error in together),
    )
    labels = [str(error["loc"][shared]) if len(error["loc"]) > shared else "" for error in together]
    if len(together) == 1 or not all(_UNION_MEMBER.fullmatch(label) for label in labels):
        return first

    def rank(index: int) -> tuple[bool, int, int, int]:
        """Better the less the value differs from the member: in its own type, and in few and late parts."""
        error = together[index]
        depth = len(error["loc"])
        is_of_other_type = depth == shared + 1 and error["type"].endswith(("_type", "_parsing", "literal_error"))
        part = next((key for key in error["loc"][shared + 1 :] if isinstance(key, int)), 0)
        return is_of_other_type, labels.count(labels[index]), -part, -depth

    best = min(range(len(together)), key=rank)
    if not rank(best)[0]:
        return together[best]
    expected = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in together)
    return {**together[best], "msg": f"Input should be {' or '.join(expected)}"}


def sendable(text: str) -> str:
    """A text that UTF-8 can carry: lone surrogates that a client sent are replaced."""
    return text.encode("utf-8", "replace").decode()


def error_responses(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The errors that any route may return, for the OpenAPI description.

    Args:
        body: The body of an error. No other model of the description may have its name.
    """
    # FastAPI builds a validator for each model of each route, which takes most of the time to start a server: the first
    # response brings the model, and the others refer to it.
    reference = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": reference}
        for status in (401, 403, 404, 405, 408, 413, 415, 429, 503)
    }
    return {400: {"description": HTTPStatus(400).phrase, "model": body}, **responses}


RESPONSES = error_responses(ErrorBody)
"""The errors of all routes but those of other APIs."""
